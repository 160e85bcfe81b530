// Noise on embeddings while training (NEFTune; Jain et al., 2023):
//
//   y[b, t, c] = x[b, t, c] + magnitude[b, t] * (2 u - 1),  u uniform in [0, 1)
//
// u is word c % 4 of philox(seed, stream, b 2^32 + t ceil(C / 4) + c / 4): it does not depend on how far rows are
// padded. x and y [B, T, C] of one floating-point type; magnitude f32 [B, T], alpha / sqrt(L C) for the tokens of a row
// (or segment) of L tokens and 0 in padding; fp32 arithmetic, one rounding of the sum. dx = dy.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct Neftune {
  Tensor x, magnitude, y;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.in(magnitude);
    v.out(y);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    checkFloat("neftune", "x", x);
    checkShape("neftune", "x", x, {-1, -1, -1});
    checkDType("neftune", "magnitude", magnitude, {DType::f32});
    checkShape("neftune", "magnitude", magnitude, {x.dim(0), x.dim(1)});
    checkDType("neftune", "y", y, {x.dtype});
    checkSameShape("neftune", "y", y, x);
  }
};

}  // namespace qlora
