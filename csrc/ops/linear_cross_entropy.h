// The output head and the loss as one operation, forward and backward in one visit, so that logits are never whole:
// rows go through in chunks whose fp32 logits take about 64 MiB, or 128 rows where the vocabulary is large.
//
//   x = h W^T + bias;  z = softCap * tanh(x / softCap) (Gemma 2), or x where softCap is 0
//   tokenLoss[i] = logsumexp_v(z[i, v]) - z[i, labels[i]]
//   loss = scale * sum_i tokenLoss[i]
//
// Backward, of lossScale[0] * loss (of loss where it is left out): f16's gradients need a larger one.
//   dx[i, v] = (softmax(z[i])[v] - [v = labels[i]]) * (1 - (z[i, v] / softCap)^2)
//   dh[i] = s * dx[i] W;    dweight += s * dx^T h,    s = scale * lossScale[0]
//
// h [.., C] of any floating-point type; weight [V, C]; bias [V] of any floating-point type; labels i32 with one element
// a row of h; lossScale and loss f32 [1]; tokenLoss f32, like labels; dh like h; dweight f32 [V, C], for a dense
// weight. A row whose label is -100 counts for nothing: its tokenLoss and dh are 0, and it costs nothing. A label
// outside [0, V) fails with ERR_QLORA_TOKEN_ID. Matrix operands are rounded to h's type and summed in fp32 (dx
// unscaled, so that a small scale does not underflow f16); logits and softmax are fp32, the sum of losses fp64 in row
// order.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "ops/weight.h"

namespace qlora {

constexpr int32_t kIgnoredLabel = -100;

struct LinearCrossEntropy {
  Tensor h;
  Weight weight;
  Tensor bias, labels, lossScale, loss, tokenLoss, dh, dweight;
  float scale, softCap;

  template <class V>
  void visit(V& v) {
    v.in(h);
    weight.visit(v);
    v.optionalIn(bias);
    v.in(labels);
    v.optionalIn(lossScale);
    v.out(loss);
    v.optionalOut(tokenLoss);
    v.optionalOut(dh);
    v.optionalAccumulate(dweight);
    v.value(scale);
    v.value(softCap);
  }
  void check() const {
    const char* op = "linearCrossEntropy";
    checkFloat(op, "h", h);
    weight.check(op);
    if (h.rank == 0 || h.dim(-1) != weight.K) {
      fail("ERR_QLORA_SHAPE", "%s: h must have shape [.., %lld], got %s", op, static_cast<long long>(weight.K),
           shapeText(h).c_str());
    }
    if (bias.defined()) {
      checkFloat(op, "bias", bias);
      checkShape(op, "bias", bias, {weight.N});
    }
    checkDType(op, "labels", labels, {DType::i32});
    if (labels.size() != h.rows()) {
      fail("ERR_QLORA_SHAPE", "%s: labels must have %lld elements, one a row of h, got %s", op,
           static_cast<long long>(h.rows()), shapeText(labels).c_str());
    }
    if (lossScale.defined()) {
      checkDType(op, "lossScale", lossScale, {DType::f32});
      checkShape(op, "lossScale", lossScale, {1});
    }
    checkDType(op, "loss", loss, {DType::f32});
    checkShape(op, "loss", loss, {1});
    if (tokenLoss.defined()) {
      checkDType(op, "tokenLoss", tokenLoss, {DType::f32});
      checkSameShape(op, "tokenLoss", tokenLoss, labels);
    }
    if (dh.defined()) {
      checkDType(op, "dh", dh, {h.dtype});
      checkSameShape(op, "dh", dh, h);
    }
    if (dweight.defined()) {
      checkFloat(op, "a trained weight", weight.data);
      checkDType(op, "dweight", dweight, {DType::f32});
      checkShape(op, "dweight", dweight, {weight.N, weight.K});
    }
    checkThat(softCap >= 0, op, "softCap must not be negative");
  }
};

}  // namespace qlora
