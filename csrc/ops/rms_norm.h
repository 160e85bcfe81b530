// Root mean square layer normalization (Zhang and Sennrich, 2019).
//
//   rstd[i] = 1 / sqrt(mean_d(x[i, d]^2) + eps)
//   y[i, d] = x[i, d] * rstd[i] * (weight[d] + offset)           offset 1 for Gemma, else 0
//
// Backward, with g = dy * (weight + offset) and xhat = x * rstd:
//   dx[i, d]   = rstd[i] * (g[i, d] - xhat[i, d] * mean_d(g * xhat))
//   dweight[d] += sum_i dy[i, d] * xhat[i, d]
//
// x, y, dx, dy [.., D] of one floating-point type; weight [D] of any; rstd [rows] f32; dweight [D] f32. All sums in fp32
// in a fixed order.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct RmsNormForward {
  Tensor x, weight, y, rstd;
  float eps, offset;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.in(weight);
    v.out(y);
    v.out(rstd);
    v.value(eps);
    v.value(offset);
  }
  void check() const {
    checkFloat("rmsNorm", "x", x);
    checkFloat("rmsNorm", "weight", weight);
    checkShape("rmsNorm", "weight", weight, {x.dim(-1)});
    checkDType("rmsNorm", "y", y, {x.dtype});
    checkSameShape("rmsNorm", "y", y, x);
    checkDType("rmsNorm", "rstd", rstd, {DType::f32});
    checkShape("rmsNorm", "rstd", rstd, {x.rows()});
  }
};

struct RmsNormBackward {
  Tensor dy, x, weight, rstd, dx, dweight;
  float offset;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(x);
    v.in(weight);
    v.in(rstd);
    v.optionalOut(dx);
    v.optionalAccumulate(dweight);
    v.value(offset);
  }
  void check() const {
    checkFloat("rmsNormBackward", "x", x);
    checkDType("rmsNormBackward", "dy", dy, {x.dtype});
    checkSameShape("rmsNormBackward", "dy", dy, x);
    checkFloat("rmsNormBackward", "weight", weight);
    checkShape("rmsNormBackward", "weight", weight, {x.dim(-1)});
    checkShape("rmsNormBackward", "rstd", rstd, {x.rows()});
    if (dx.defined()) {
      checkDType("rmsNormBackward", "dx", dx, {x.dtype});
      checkSameShape("rmsNormBackward", "dx", dx, x);
    }
    if (dweight.defined()) {
      checkDType("rmsNormBackward", "dweight", dweight, {DType::f32});
      checkSameShape("rmsNormBackward", "dweight", dweight, weight);
    }
  }
};

}  // namespace qlora
