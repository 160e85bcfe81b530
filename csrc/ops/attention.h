// Softmax attention in blocks, as FlashAttention-2 (Dao, 2023): scores exist only for a block of queries and keys.
//
// Query i of Tq stands at key position n(i) = keyLength - Tq + i and sees key j < keyLength iff
//   j <= n(i)                        where causal is 1,
//   j > n(i) - window                where window is not 0 (it counts the query's own position),
//   keySegments[j] = querySegments[i] >= 0   where segment ids are given; a negative one is padding.
// Query head h reads key and value head h / (H / Hkv).
//
//   s[i, j] = scale * dot(q[i], k[j]);  s = softCap * tanh(s / softCap) where softCap is not 0
//   logSumExp[i] = log(sum_j exp(s[i, j]));  p[i, j] = exp(s[i, j] - logSumExp[i]);  out[i] = sum_j p[i, j] v[j]
// over the keys seen. A query that sees none has out 0 and logSumExp -infinity.
//
// Backward, with p made again from logSumExp and delta[i] = dot(dout[i], out[i]):
//   dv[j] = sum_i p[i, j] dout[i]
//   ds[i, j] = p[i, j] (dot(dout[i], v[j]) - delta[i]), times 1 - (s / softCap)^2 where softCap is not 0
//   dq[i] = scale * sum_j ds[i, j] k[j];  dk[j] = scale * sum_i ds[i, j] q[i]
// dk and dv are sums over the query heads of their group too.
//
// q, out, dout, dq [B, Tq, H, D]; k, v, dk, dv [B, S, Hkv, D], all of one floating-point type; segment ids i32 [B, Tq]
// and [B, S], both or neither; logSumExp f32 [B, H, Tq]. keyLength is S, or where k and v are a cache with spare room,
// pastLength[b] + Tq: pastLength i32 [B] is a tensor, so that a recording can go ever further on; too long a one fails
// with ERR_QLORA_SHAPE. Backward takes all S keys. out, logSumExp, dq, dk, dv are overwritten. All sums are in fp32, in an order that depends on shapes alone.
// Products are of fp32 values, but on processors with bf16 dot products bf16 tensors keep p and ds in bf16 too.
#pragma once

#include <cmath>

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

inline void checkAttention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& querySegments, const Tensor& keySegments, const Tensor& out,
                           const Tensor& logSumExp) {
  checkFloat(op, "q", q);
  checkShape(op, "q", q, {-1, -1, -1, -1});
  checkDType(op, "k", k, {q.dtype});
  checkShape(op, "k", k, {q.dim(0), -1, -1, q.dim(3)});
  checkDType(op, "v", v, {q.dtype});
  checkSameShape(op, "v", v, k);
  if (k.dim(2) < 1 || q.dim(2) % k.dim(2) != 0) {
    fail("ERR_QLORA_SHAPE", "%s: the number of heads must be a multiple of that of key heads, got %lld and %lld", op,
         static_cast<long long>(q.dim(2)), static_cast<long long>(k.dim(2)));
  }
  checkThat(querySegments.defined() == keySegments.defined(), op,
            "querySegments and keySegments must be given both or not at all");
  if (querySegments.defined()) {
    checkDType(op, "querySegments", querySegments, {DType::i32});
    checkShape(op, "querySegments", querySegments, {q.dim(0), q.dim(1)});
    checkDType(op, "keySegments", keySegments, {DType::i32});
    checkShape(op, "keySegments", keySegments, {k.dim(0), k.dim(1)});
  }
  checkDType(op, "out", out, {q.dtype});
  checkSameShape(op, "out", out, q);
  checkDType(op, "logSumExp", logSumExp, {DType::f32});
  checkShape(op, "logSumExp", logSumExp, {q.dim(0), q.dim(2), q.dim(1)});
}

inline void checkAttentionOptions(const char* op, float scale, int causal, int64_t window, float softCap) {
  checkThat(std::isfinite(scale) && scale > 0, op, "scale must be a positive number");
  checkThat(causal == 0 || causal == 1, op, "causal must be 0 or 1");
  checkThat(window >= 0, op, "window must not be negative; 0 is none");
  checkThat(std::isfinite(softCap) && softCap >= 0, op, "softCap must not be negative; 0 is none");
}

}  // namespace detail

struct AttentionForward {
  Tensor q, k, v, querySegments, keySegments, pastLength, out, logSumExp;
  float scale;
  int causal;
  int64_t window;
  float softCap;

  template <class V>
  void visit(V& visitor) {
    visitor.in(q);
    visitor.in(k);
    visitor.in(v);
    visitor.optionalIn(querySegments);
    visitor.optionalIn(keySegments);
    visitor.optionalIn(pastLength);
    visitor.out(out);
    visitor.out(logSumExp);
    visitor.value(scale);
    visitor.value(causal);
    visitor.value(window);
    visitor.value(softCap);
  }
  void check() const {
    detail::checkAttention("attention", q, k, v, querySegments, keySegments, out, logSumExp);
    detail::checkAttentionOptions("attention", scale, causal, window, softCap);
    if (!pastLength.defined()) return;
    checkDType("attention", "pastLength", pastLength, {DType::i32});
    checkShape("attention", "pastLength", pastLength, {q.dim(0)});
  }
};

struct AttentionBackward {
  Tensor dout, q, k, v, out, logSumExp, querySegments, keySegments, dq, dk, dv;
  float scale;
  int causal;
  int64_t window;
  float softCap;

  template <class V>
  void visit(V& visitor) {
    visitor.in(dout);
    visitor.in(q);
    visitor.in(k);
    visitor.in(v);
    visitor.in(out);
    visitor.in(logSumExp);
    visitor.optionalIn(querySegments);
    visitor.optionalIn(keySegments);
    visitor.out(dq);
    visitor.out(dk);
    visitor.out(dv);
    visitor.value(scale);
    visitor.value(causal);
    visitor.value(window);
    visitor.value(softCap);
  }
  void check() const {
    detail::checkAttention("attentionBackward", q, k, v, querySegments, keySegments, out, logSumExp);
    detail::checkAttentionOptions("attentionBackward", scale, causal, window, softCap);
    checkDType("attentionBackward", "dout", dout, {q.dtype});
    checkSameShape("attentionBackward", "dout", dout, q);
    checkDType("attentionBackward", "dq", dq, {q.dtype});
    checkSameShape("attentionBackward", "dq", dq, q);
    checkDType("attentionBackward", "dk", dk, {k.dtype});
    checkSameShape("attentionBackward", "dk", dk, k);
    checkDType("attentionBackward", "dv", dv, {k.dtype});
    checkSameShape("attentionBackward", "dv", dv, k);
  }
};

}  // namespace qlora
