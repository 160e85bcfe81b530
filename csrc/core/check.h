// Checks of an operation's arguments, made on the caller's thread before anything is enqueued. A kernel trusts them.
#pragma once

#include <initializer_list>
#include <string>

#include "core/error.h"
#include "core/tensor.h"

namespace qlora {

inline std::string shapeText(const int64_t* shape, int rank) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}
inline std::string shapeText(const Tensor& t) { return shapeText(t.shape.data(), t.rank); }

/// -1 in `expected` accepts any size.
inline void checkShape(const char* op, const char* argument, const Tensor& t, std::initializer_list<int64_t> expected) {
  bool same = t.rank == static_cast<int>(expected.size());
  int i = 0;
  for (int64_t n : expected) {
    same = same && (n < 0 || t.shape[i] == n);
    ++i;
  }
  if (!same) {
    fail("ERR_QLORA_SHAPE", "%s: %s must have shape %s, got %s", op, argument,
         shapeText(expected.begin(), static_cast<int>(expected.size())).c_str(), shapeText(t).c_str());
  }
}

inline void checkSameShape(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  if (t.rank != like.rank || t.shape != like.shape) {
    fail("ERR_QLORA_SHAPE", "%s: %s must have shape %s, got %s", op, argument, shapeText(like).c_str(),
         shapeText(t).c_str());
  }
}

inline void checkDType(const char* op, const char* argument, const Tensor& t, std::initializer_list<DType> accepted) {
  std::string names;
  for (DType d : accepted) {
    if (t.dtype == d) return;
    names += (names.empty() ? "" : " or ") + std::string(name(d));
  }
  fail("ERR_QLORA_DTYPE", "%s: %s must be %s, got %s", op, argument, names.c_str(), name(t.dtype));
}

inline void checkFloat(const char* op, const char* argument, const Tensor& t) {
  checkDType(op, argument, t, {DType::f32, DType::bf16, DType::f16});
}

inline void checkThat(bool condition, const char* op, const char* message) {
  if (!condition) fail("ERR_QLORA_ARGUMENT", "%s: %s", op, message);
}

}  // namespace qlora
