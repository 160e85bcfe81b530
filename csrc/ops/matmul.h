// Product with a weight of any kind, W [N, K] (ops/weight.h): the linear layer without adapters.
//
//   forward           y = x W^T + bias              x [.., K], bias [N], y [.., N]
//   backward          dx = dy W                     dy [.., N], dx [.., K]
//   backward, weight  dweight += dy^T x, dbias += sum over rows of dy      of a trainable weight
//
// x, dy: f32, bf16 or f16. The compute type is x's (dy's): W is dequantized to it, with one rounding, the same in both
// directions; products and sums are fp32. y (dx) has that type or f32 and is overwritten; dweight [N, K] and dbias [N]
// are f32 and accumulated. W is never whole in memory but in the form in which it is stored.
//
// An 8-bit W multiplies forward as LLM.int8 does (Dettmers et al., 2022): x is cast to fp16; columns of x with any
// |x| >= 6 are multiplied in fp16 with W dequantized to fp16; the rest of a row becomes integers, whose products are
// exact: y = sum(q qW) * absmax * absmaxW / 16129. Its backward is dy W with W dequantized.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "ops/weight.h"

namespace qlora {

/// `t` must be [.., last] with the leading sizes of `like`.
inline void checkLeading(const char* op, const char* argument, const Tensor& t, const Tensor& like, int64_t last) {
  bool same = t.rank == like.rank && t.rank > 0 && t.dim(-1) == last;
  for (int i = 0; same && i + 1 < t.rank; ++i) same = t.shape[i] == like.shape[i];
  if (!same) {
    fail("ERR_QLORA_SHAPE", "%s: %s must have shape [.., %lld] with the leading sizes of %s, got %s", op, argument,
         static_cast<long long>(last), shapeText(like).c_str(), shapeText(t).c_str());
  }
}

inline void checkLast(const char* op, const char* argument, const Tensor& t, int64_t last) {
  if (t.rank == 0 || t.dim(-1) != last) {
    fail("ERR_QLORA_SHAPE", "%s: %s must have shape [.., %lld], got %s", op, argument, static_cast<long long>(last),
         shapeText(t).c_str());
  }
}

struct MatmulForward {
  Tensor x;
  Weight weight;
  Tensor bias, y;

  template <class V>
  void visit(V& v) {
    v.in(x);
    weight.visit(v);
    v.optionalIn(bias);
    v.out(y);
  }
  void check() const {
    weight.check("matmul");
    checkFloat("matmul", "x", x);
    checkLast("matmul", "x", x, weight.K);
    if (bias.defined()) {
      checkFloat("matmul", "bias", bias);
      checkShape("matmul", "bias", bias, {weight.N});
    }
    checkDType("matmul", "y", y, {x.dtype, DType::f32});
    checkLeading("matmul", "y", y, x, weight.N);
  }
};

struct MatmulBackward {
  Tensor dy;
  Weight weight;
  Tensor dx;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    weight.visit(v);
    v.out(dx);
  }
  void check() const {
    weight.check("matmulBackward");
    checkFloat("matmulBackward", "dy", dy);
    checkLast("matmulBackward", "dy", dy, weight.N);
    checkDType("matmulBackward", "dx", dx, {dy.dtype, DType::f32});
    checkLeading("matmulBackward", "dx", dx, dy, weight.K);
  }
};

struct MatmulBackwardWeight {
  Tensor dy, x, dweight, dbias;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(x);
    v.optionalAccumulate(dweight);
    v.optionalAccumulate(dbias);
  }
  void check() const {
    checkFloat("matmulBackwardWeight", "dy", dy);
    checkFloat("matmulBackwardWeight", "x", x);
    checkThat(dy.rank > 0 && x.rank > 0, "matmulBackwardWeight", "dy and x must have at least one dimension");
    checkLeading("matmulBackwardWeight", "x", x, dy, x.dim(-1));
    if (dweight.defined()) {
      checkDType("matmulBackwardWeight", "dweight", dweight, {DType::f32});
      checkShape("matmulBackwardWeight", "dweight", dweight, {dy.dim(-1), x.dim(-1)});
    }
    if (dbias.defined()) {
      checkDType("matmulBackwardWeight", "dbias", dbias, {DType::f32});
      checkShape("matmulBackwardWeight", "dbias", dbias, {dy.dim(-1)});
    }
  }
};

}  // namespace qlora
