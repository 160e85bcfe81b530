// DoRA, weight-decomposed low-rank adaptation (Liu et al., 2024): the adapted weight keeps its direction, and a trained
// vector takes the place of its row norms.
//
//   norm[n] = || W[n, :] + scale * (B A)[n, :] ||_2          loraRowNorm: once a step, a constant for the gradient
//   y[.., n] = z[.., n] * magnitude[n] / norm[n] + bias[n]   doraScaleForward; z = x (W + scale B A)^T, no bias
//
// Backward, norm being a constant as in the paper's section 4.3 and in PEFT:
//   dz = dy * magnitude / norm
//   dmagnitude[n] += sum over rows of dy[.., n] * z[.., n] / norm[n]
//
// W [N, K] of any kind, dequantized to the type that `compute` names (0 f32, 1 bf16, 2 f16); loraA [r, K], loraB [N,
// r], magnitude, norm [N], dmagnitude [N] f32; z, y, dy, dz [.., N] f32, bf16 or f16, of one type; bias [N] any. W +
// scale B A is never whole in memory.
#pragma once

#include "ops/matmul.h"

namespace qlora {

struct LoraRowNorm {
  Weight weight;
  Tensor loraA, loraB, norm;
  float scale;
  int32_t compute;

  template <class V>
  void visit(V& v) {
    weight.visit(v);
    v.in(loraA);
    v.in(loraB);
    v.out(norm);
    v.value(scale);
    v.value(compute);
  }
  void check() const {
    const char* op = "loraRowNorm";
    weight.check(op);
    checkDType(op, "loraA", loraA, {DType::f32});
    checkShape(op, "loraA", loraA, {-1, weight.K});
    checkDType(op, "loraB", loraB, {DType::f32});
    checkShape(op, "loraB", loraB, {weight.N, loraA.dim(0)});
    checkDType(op, "norm", norm, {DType::f32});
    checkShape(op, "norm", norm, {weight.N});
    checkThat(compute >= 0 && compute <= 2, op, "compute must be 0 (f32), 1 (bf16) or 2 (f16)");
  }
};

struct DoraScaleForward {
  Tensor z, magnitude, norm, bias, y;

  template <class V>
  void visit(V& v) {
    v.in(z);
    v.in(magnitude);
    v.in(norm);
    v.optionalIn(bias);
    v.out(y);
  }
  void check() const {
    const char* op = "doraScale";
    checkFloat(op, "z", z);
    checkThat(z.rank > 0, op, "z must have at least one dimension");
    checkDType(op, "magnitude", magnitude, {DType::f32});
    checkShape(op, "magnitude", magnitude, {z.dim(-1)});
    checkDType(op, "norm", norm, {DType::f32});
    checkShape(op, "norm", norm, {z.dim(-1)});
    if (bias.defined()) {
      checkFloat(op, "bias", bias);
      checkShape(op, "bias", bias, {z.dim(-1)});
    }
    checkDType(op, "y", y, {z.dtype});
    checkSameShape(op, "y", y, z);
  }
};

struct DoraScaleBackward {
  Tensor dy, z, magnitude, norm, dz, dmagnitude;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(z);
    v.in(magnitude);
    v.in(norm);
    v.optionalOut(dz);
    v.optionalAccumulate(dmagnitude);
  }
  void check() const {
    const char* op = "doraScaleBackward";
    checkFloat(op, "z", z);
    checkThat(z.rank > 0, op, "z must have at least one dimension");
    checkDType(op, "dy", dy, {z.dtype});
    checkSameShape(op, "dy", dy, z);
    checkDType(op, "magnitude", magnitude, {DType::f32});
    checkShape(op, "magnitude", magnitude, {z.dim(-1)});
    checkDType(op, "norm", norm, {DType::f32});
    checkShape(op, "norm", norm, {z.dim(-1)});
    if (dz.defined()) {
      checkDType(op, "dz", dz, {z.dtype});
      checkSameShape(op, "dz", dz, z);
    }
    if (dmagnitude.defined()) {
      checkDType(op, "dmagnitude", dmagnitude, {DType::f32});
      checkShape(op, "dmagnitude", dmagnitude, {z.dim(-1)});
    }
  }
};

}  // namespace qlora
