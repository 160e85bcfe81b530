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
//
// ropeAppend, of new tokens' queries, keys and values in a layer with a cache, whose room is for tokens to come:
//   turned = rope(q)
//   keys[b, at[b] + t] = rope(k)[b, t], values[b, at[b] + t] = v[b, t]
// q, turned [B, T, H, D], k, v [B, T, G, D], keys, values [B, S, G, D] of one floating-point type; cos, sin of B T
// rows; at i32 [B], which fails with ERR_QLORA_SHAPE where at[b] + T > S: it is a tensor, so that a recording can
// append ever further on. The rest of the cache stays as it is. Where the operation fails the cache fails with it: what
// reads it would compute with tokens that are not there.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

inline void checkHead(const char* op, const Tensor& cos, int64_t D) {
  if (2 * cos.dim(1) <= D) return;
  fail("ERR_QLORA_SHAPE", "%s: cos has %lld columns, which turn %lld elements, but a head has only %lld", op,
       static_cast<long long>(cos.dim(1)), static_cast<long long>(2 * cos.dim(1)), static_cast<long long>(D));
}

}  // namespace detail

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
    detail::checkHead("rope", cos, x.dim(-1));
    checkDType("rope", "sin", sin, {DType::f32});
    checkSameShape("rope", "sin", sin, cos);
    checkDType("rope", "y", y, {x.dtype});
    checkSameShape("rope", "y", y, x);
    checkThat(direction == 1 || direction == -1, "rope", "direction must be 1 or -1");
  }
};

struct RopeAppend {
  Tensor q, k, v, cos, sin, at, turned, keys, values;

  template <class V>
  void visit(V& visitor) {
    visitor.in(q);
    visitor.in(k);
    visitor.in(v);
    visitor.in(cos);
    visitor.in(sin);
    visitor.in(at);
    visitor.out(turned);
    visitor.accumulate(keys);
    visitor.accumulate(values);
  }
  void check() const {
    const char* op = "ropeAppend";
    checkFloat(op, "q", q);
    checkShape(op, "q", q, {-1, -1, -1, -1});
    const int64_t B = q.dim(0), T = q.dim(1), D = q.dim(3);
    checkDType(op, "k", k, {q.dtype});
    checkShape(op, "k", k, {B, T, -1, D});
    checkDType(op, "v", v, {q.dtype});
    checkSameShape(op, "v", v, k);
    checkDType(op, "cos", cos, {DType::f32});
    checkShape(op, "cos", cos, {B * T, -1});
    detail::checkHead(op, cos, D);
    checkDType(op, "sin", sin, {DType::f32});
    checkSameShape(op, "sin", sin, cos);
    checkDType(op, "at", at, {DType::i32});
    checkShape(op, "at", at, {B});
    checkDType(op, "turned", turned, {q.dtype});
    checkSameShape(op, "turned", turned, q);
    checkDType(op, "keys", keys, {q.dtype});
    checkShape(op, "keys", keys, {B, -1, k.dim(2), D});
    checkDType(op, "values", values, {q.dtype});
    checkSameShape(op, "values", values, keys);
  }
  /// Of the values of `at`.
  void checkPlace(int32_t place) const {
    const int64_t T = q.dim(1), S = keys.dim(1);
    if (place >= 0 && place + T <= S) return;
    fail("ERR_QLORA_SHAPE", "ropeAppend: %lld tokens at %d do not fit into a cache of %lld", static_cast<long long>(T),
         place, static_cast<long long>(S));
  }
};

}  // namespace qlora
