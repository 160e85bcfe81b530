// A frozen linear layer with a low-rank adapter (Hu et al., 2021), over a base of any kind, W [N, K] (ops/weight.h).
//
//   t = dropout(x) A^T                           A = loraA [r, K], B = loraB [N, r]
//   y = x W^T + bias + scale * t B^T             scale = alpha / r, or alpha / sqrt(r) with rsLoRA
//
// Backward, with u = scale * dy B:
//   dx     = dy W + mask * (u A)
//   dloraB += scale * dy^T t
//   dloraA += u^T dropout(x)
//
// dropout(x) = mask * x, mask[e] = 0 where uniform(philox(seed, stream, e / 4)[e % 4]) < p, else 1 / (1 - p), e the
// flat index of x. The mask is never stored: the backward draws it again from the same seed and stream.
//
// x, dy [.., K], [.., N] f32, bf16 or f16, of one type, the compute type (ops/matmul.h says how W takes part, 8-bit
// included); loraA, loraB f32, rounded to the compute type (loraB after the multiplication by scale), where nothing is
// trained also of the compute type already; bias [N] any;
// t [.., r] of x's type, an output that the backward wants back; y, dx of x's type. dloraA, dloraB f32, accumulated.
// All sums in fp32.
//
// projections: layers that share x, without gradients, each with or without an adapter, bit for bit as loraLinear or
// matmul would compute it; where there is a residual [.., N] of x's type it is added to y as it was rounded, and the
// sum rounded once more. A device may do with them all at once.
#pragma once

#include "ops/matmul.h"

namespace qlora {

struct LoraLinearForward {
  Tensor x;
  Weight weight;
  Tensor bias, loraA, loraB, y, t;
  float scale, dropout;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(x);
    weight.visit(v);
    v.optionalIn(bias);
    v.in(loraA);
    v.in(loraB);
    v.out(y);
    v.out(t);
    v.value(scale);
    v.value(dropout);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    const char* op = "loraLinear";
    weight.check(op);
    checkFloat(op, "x", x);
    checkLast(op, "x", x, weight.K);
    if (bias.defined()) {
      checkFloat(op, "bias", bias);
      checkShape(op, "bias", bias, {weight.N});
    }
    checkDType(op, "loraA", loraA, {DType::f32, x.dtype});
    checkShape(op, "loraA", loraA, {-1, weight.K});
    checkDType(op, "loraB", loraB, {DType::f32, x.dtype});
    checkShape(op, "loraB", loraB, {weight.N, loraA.dim(0)});
    checkDType(op, "y", y, {x.dtype});
    checkLeading(op, "y", y, x, weight.N);
    checkDType(op, "t", t, {x.dtype});
    checkLeading(op, "t", t, x, loraA.dim(0));
    checkThat(dropout >= 0 && dropout < 1, op, "dropout must lie in [0, 1)");
  }
};

struct LoraLinearBackward {
  Tensor dy, x;
  Weight weight;
  Tensor loraA, loraB, t, dx, dloraA, dloraB;
  float scale, dropout;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(x);
    weight.visit(v);
    v.in(loraA);
    v.in(loraB);
    v.in(t);
    v.optionalOut(dx);
    v.accumulate(dloraA);
    v.accumulate(dloraB);
    v.value(scale);
    v.value(dropout);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    const char* op = "loraLinearBackward";
    weight.check(op);
    checkFloat(op, "x", x);
    checkLast(op, "x", x, weight.K);
    checkDType(op, "dy", dy, {x.dtype});
    checkLeading(op, "dy", dy, x, weight.N);
    checkDType(op, "loraA", loraA, {DType::f32});
    checkShape(op, "loraA", loraA, {-1, weight.K});
    checkDType(op, "loraB", loraB, {DType::f32});
    checkShape(op, "loraB", loraB, {weight.N, loraA.dim(0)});
    checkDType(op, "t", t, {x.dtype});
    checkLeading(op, "t", t, x, loraA.dim(0));
    if (dx.defined()) {
      checkDType(op, "dx", dx, {x.dtype});
      checkSameShape(op, "dx", dx, x);
    }
    checkDType(op, "dloraA", dloraA, {DType::f32});
    checkSameShape(op, "dloraA", dloraA, loraA);
    checkDType(op, "dloraB", dloraB, {DType::f32});
    checkSameShape(op, "dloraB", dloraB, loraB);
    checkThat(dropout >= 0 && dropout < 1, op, "dropout must lie in [0, 1)");
  }
};

struct Projection {
  Weight weight;
  Tensor bias, loraA, loraB, residual, y, t;  // loraA, loraB and t together or none of them
  float scale;

  template <class V>
  void visit(V& v) {
    weight.visit(v);
    v.optionalIn(bias);
    v.optionalIn(loraA);
    v.optionalIn(loraB);
    v.optionalIn(residual);
    v.out(y);
    v.optionalOut(t);
    v.value(scale);
  }
  void check(const Tensor& x) const {
    const char* op = "projections";
    if (loraA.defined()) {
      LoraLinearForward{x, weight, bias, loraA, loraB, y, t, scale, 0, 0, 0}.check();
    } else {
      checkThat(!loraB.defined() && !t.defined(), op, "loraA, loraB and t come together or not at all");
      MatmulForward{x, weight, bias, y}.check();
      checkDType(op, "y", y, {x.dtype});
    }
    if (!residual.defined()) return;
    checkDType(op, "residual", residual, {y.dtype});
    checkSameShape(op, "residual", residual, y);
  }
};

struct Projections {
  static constexpr int kMost = 3;

  Tensor x;
  int count;
  Projection layers[kMost];

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.value(count);
    for (int i = 0; i < count && i < kMost; ++i) layers[i].visit(v);
  }
  void check() const {
    checkThat(count > 0 && count <= kMost, "projections", "there must be from one to three layers");
    for (int i = 0; i < count; ++i) layers[i].check(x);
  }
};

}  // namespace qlora
