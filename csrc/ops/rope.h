// Rotary position embedding (Su et al., 2021), in the half-split layout of GPT-NeoX that Hugging Face's models use.
//
// ropeTable, with R = 2 * the number of frequencies:
//   angle[m, r] = fp32(positions[m] * inverseFrequencies[r])
//   cos[m, r] = factor * cos(angle), sin[m, r] = factor * sin(angle)
// positions i32 [M]; inverseFrequencies f32 [R / 2]; cos, sin f32 [M, R / 2]. The product is rounded to fp32 first, as
// transformers computes it. factor is the scaling of attention that some long-context variants ask for, else 1.
//
// rope, for row m, each head, and r < R / 2:
//   y[r]         = x[r] * cos[m, r] - direction * x[r + R / 2] * sin[m, r]
//   y[r + R / 2] = x[r + R / 2] * cos[m, r] + direction * x[r] * sin[m, r]
// and y = x beyond R. x, y [.., H, D] of one floating-point type, whose leading dimensions multiply to M. direction 1
// is the forward pass; -1 turns the other way, which is the backward pass. Computed in fp32, rounded once.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct RopeTable {
  Tensor positions, inverseFrequencies, cos, sin;
  float factor;

  template <class V>
  void visit(V& v) {
    v.in(positions);
    v.in(inverseFrequencies);
    v.out(cos);
    v.out(sin);
    v.value(factor);
  }
  void check() const {
    checkDType("ropeTable", "positions", positions, {DType::i32});
    checkShape("ropeTable", "positions", positions, {-1});
    checkDType("ropeTable", "inverseFrequencies", inverseFrequencies, {DType::f32});
    checkShape("ropeTable", "inverseFrequencies", inverseFrequencies, {-1});
    checkDType("ropeTable", "cos", cos, {DType::f32});
    checkShape("ropeTable", "cos", cos, {positions.dim(0), inverseFrequencies.dim(0)});
    checkDType("ropeTable", "sin", sin, {DType::f32});
    checkSameShape("ropeTable", "sin", sin, cos);
  }
};

struct Rope {
  Tensor x, cos, sin, y;
  float direction;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.in(cos);
    v.in(sin);
    v.out(y);
    v.value(direction);
  }
  void check() const {
    checkFloat("rope", "x", x);
    if (x.rank < 3) fail("ERR_QLORA_SHAPE", "rope: x must have shape [.., H, D], got %s", shapeText(x).c_str());
    int64_t rows = 1;
    for (int i = 0; i < x.rank - 2; ++i) rows *= x.dim(i);
    checkDType("rope", "cos", cos, {DType::f32});
    checkShape("rope", "cos", cos, {rows, -1});
    if (2 * cos.dim(1) > x.dim(-1)) {
      fail("ERR_QLORA_SHAPE", "rope: cos has %lld columns, which turn %lld elements, but a head has only %lld",
           static_cast<long long>(cos.dim(1)), static_cast<long long>(2 * cos.dim(1)),
           static_cast<long long>(x.dim(-1)));
    }
    checkDType("rope", "sin", sin, {DType::f32});
    checkSameShape("rope", "sin", sin, cos);
    checkDType("rope", "y", y, {x.dtype});
    checkSameShape("rope", "y", y, x);
    checkThat(direction == 1 || direction == -1, "rope", "direction must be 1 or -1");
  }
};

}  // namespace qlora
