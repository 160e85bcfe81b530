// Conversion between f32, bf16 and f16: y[i] = round(x[i]), to nearest, ties to even; subnormals are kept, overflow is
// infinity, NaN stays NaN. x and y of one shape; y may not be x.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct Cast {
  Tensor x, y;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(y);
  }
  void check() const {
    checkFloat("cast", "x", x);
    checkFloat("cast", "y", y);
    checkSameShape("cast", "y", y, x);
  }
};

}  // namespace qlora
