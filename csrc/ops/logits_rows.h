// What all operations on rows of logits check first: shapes, and that the numbers can be compared.
#pragma once

#include "core/check.h"
#include "simd/lanes.h"

namespace qlora {

namespace detail {

inline void checkLogitsShape(const char* op, const Tensor& logits) {
  checkDType(op, "logits", logits, {DType::f32});
  checkShape(op, "logits", logits, {-1, -1});
  checkThat(logits.dim(1) > 0, op, "logits must have at least one column");
}

inline void checkLogitsOut(const char* op, const Tensor& logits, const Tensor& out) {
  checkLogitsShape(op, logits);
  checkDType(op, "out", out, {DType::f32});
  checkSameShape(op, "out", out, logits);
}

}  // namespace detail

QLORA_INLINE float largestLogit(const float* z, int64_t V) {
  return laneMax(V, [&](int64_t i) { return z[i]; });
}

[[noreturn]] QLORA_INLINE void failNotFinite(const char* op, int64_t row) {
  fail("ERR_QLORA_NON_FINITE", "%s: the logits of row %lld are not finite numbers", op, static_cast<long long>(row));
}
[[noreturn]] QLORA_INLINE void failNoTokenLeft(const char* op, int64_t row) {
  fail("ERR_QLORA_NO_TOKEN_LEFT", "%s: every token of row %lld is forbidden; noRepeatNgramSize may be too strict", op,
       static_cast<long long>(row));
}

/// NaN and +infinity come from a model that broke; -infinity is a token that was forbidden.
QLORA_INLINE void checkLogits(const char* op, const float* logits, int64_t B, int64_t V) {
  for (int64_t row = 0; row < B; ++row) {
    const float* z = logits + row * V;
    const float notNumbers = laneSum(V, [&](int64_t i) { return z[i] != z[i] ? 1.0f : 0.0f; });
    if (notNumbers != 0 || largestLogit(z, V) == __builtin_inff()) failNotFinite(op, row);
  }
}

/// As above, and refuses a row of nothing but -infinity.
QLORA_INLINE void checkSomeLogit(const char* op, const float* logits, int64_t B, int64_t V) {
  checkLogits(op, logits, B, V);
  for (int64_t row = 0; row < B; ++row) {
    if (largestLogit(logits + row * V, V) == -__builtin_inff()) failNoTokenLeft(op, row);
  }
}

}  // namespace qlora
