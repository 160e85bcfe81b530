// Shapes that all operations on rows of logits check first, and their errors of values.
#pragma once

#include "core/check.h"

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

[[noreturn]] QLORA_INLINE void failNotFinite(const char* op, int64_t row) {
  fail("ERR_QLORA_NON_FINITE", "%s: the logits of row %lld are not finite numbers", op, static_cast<long long>(row));
}
[[noreturn]] QLORA_INLINE void failNoTokenLeft(const char* op, int64_t row) {
  fail("ERR_QLORA_NO_TOKEN_LEFT", "%s: every token of row %lld is forbidden; noRepeatNgramSize may be too strict", op,
       static_cast<long long>(row));
}

}  // namespace qlora
