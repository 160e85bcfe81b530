// Elementwise operations.
//
//   fill            x[i] = value                       any dtype; value truncated for integers
//   add             y[i] = a[i] + b[i]
//   scale           y[i] = x[i] * factor
//   scaleByTensor   y[i] = x[i] * factor[0]            factor f32 [1], known only on the device
//   dropout         y[i] = x[i] * (kept(i) ? 1 / (1 - p) : 0)      p in [0, 1)
//
// a, b, x and y have one shape and one floating-point type; fp32 arithmetic, one rounding. dropout's mask is a function
// of (seed, stream, i) (simd/dropout.h), so that its backward is the same operation on dy.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

inline void checkElementwise(const char* op, const Tensor& x, const Tensor& y) {
  checkFloat(op, "x", x);
  checkDType(op, "y", y, {x.dtype});
  checkSameShape(op, "y", y, x);
}

}  // namespace detail

struct Fill {
  Tensor x;
  float value;

  template <class V>
  void visit(V& v) {
    v.out(x);
    v.value(value);
  }
  void check() const {
    const float low = x.dtype == DType::i8 ? -128.0f : x.dtype == DType::i32 ? -0x1p31f : 0.0f;
    const float high = x.dtype == DType::i8 ? 127.0f : x.dtype == DType::u8 ? 255.0f : 0x1.fffffep30f;
    if (!isFloat(x.dtype) && !(value >= low && value <= high)) {
      fail("ERR_QLORA_ARGUMENT", "fill: value must fit %s, got %g", name(x.dtype), static_cast<double>(value));
    }
  }
};

struct Add {
  Tensor a, b, y;

  template <class V>
  void visit(V& v) {
    v.in(a);
    v.in(b);
    v.out(y);
  }
  void check() const {
    checkFloat("add", "a", a);
    checkDType("add", "b", b, {a.dtype});
    checkSameShape("add", "b", b, a);
    checkDType("add", "y", y, {a.dtype});
    checkSameShape("add", "y", y, a);
  }
};

struct Scale {
  Tensor x, y;
  float factor;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(y);
    v.value(factor);
  }
  void check() const { detail::checkElementwise("scale", x, y); }
};

struct ScaleByTensor {
  Tensor x, factor, y;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.in(factor);
    v.out(y);
  }
  void check() const {
    detail::checkElementwise("scaleByTensor", x, y);
    checkDType("scaleByTensor", "factor", factor, {DType::f32});
    checkShape("scaleByTensor", "factor", factor, {1});
  }
};

struct Dropout {
  Tensor x, y;
  float p;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(y);
    v.value(p);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    detail::checkElementwise("dropout", x, y);
    if (!(p >= 0 && p < 1)) {
      fail("ERR_QLORA_ARGUMENT", "dropout: p must be at least 0 and less than 1, got %g", static_cast<double>(p));
    }
  }
};

}  // namespace qlora
