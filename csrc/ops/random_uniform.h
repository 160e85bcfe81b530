// Uniform random numbers: y[i] = low + (high - low) * u, with u in [0, 1) from word i % 4 of philox(seed, stream, i / 4).
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct RandomUniform {
  Tensor y;  // f32, any shape
  float low, high;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.out(y);
    v.value(low);
    v.value(high);
    v.value(seed);
    v.value(stream);
  }
  void check() const { checkDType("randomUniform", "y", y, {DType::f32}); }
};

}  // namespace qlora
