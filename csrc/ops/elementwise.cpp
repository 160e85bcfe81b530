#include "ops/elementwise.h"

#include <algorithm>

#include "simd/chunks.h"
#include "simd/dropout.h"

namespace qlora::QLORA_ISA {

namespace {

template <class T>
void fillWith(Context& context, const Tensor& t, T value) {
  T* x = t.data<T>();
  forChunks(context, t.size(), [x, value](int64_t begin, int64_t end) { std::fill(x + begin, x + end, value); });
}

void scaleInto(Context& context, const Tensor& from, const Tensor& to, float factor) {
  dispatchFloat(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* __restrict x = from.data<T>();
    T* __restrict y = to.data<T>();
    forChunks(context, from.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y[i] = fromFloat<T>(toFloat(x[i]) * factor);
    });
  });
}

}  // namespace

void fill(Context& context, const Fill& a) {
  switch (a.x.dtype) {
    case DType::f32:
      return fillWith(context, a.x, a.value);
    case DType::bf16:
      return fillWith(context, a.x, fromFloat<bf16>(a.value));
    case DType::f16:
      return fillWith(context, a.x, fromFloat<f16>(a.value));
    case DType::i32:
      return fillWith(context, a.x, static_cast<int32_t>(a.value));
    case DType::u8:
      return fillWith(context, a.x, static_cast<uint8_t>(a.value));
    case DType::i8:
      return fillWith(context, a.x, static_cast<int8_t>(a.value));
  }
}

void add(Context& context, const Add& a) {
  dispatchFloat(a.a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* left = a.a.data<T>();
    const T* right = a.b.data<T>();
    T* __restrict y = a.y.data<T>();
    forChunks(context, a.a.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y[i] = fromFloat<T>(toFloat(left[i]) + toFloat(right[i]));
    });
  });
}

void scale(Context& context, const Scale& a) { scaleInto(context, a.x, a.y, a.factor); }

void scaleByTensor(Context& context, const ScaleByTensor& a) {
  scaleInto(context, a.x, a.y, a.factor.data<float>()[0]);
}

void dropout(Context& context, const Dropout& a) {
  const DropoutMask mask{a.p, a.seed, a.stream};
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* __restrict x = a.x.data<T>();
    T* __restrict y = a.y.data<T>();
    forChunks(context, a.x.size(), [&](int64_t begin, int64_t end) {
      float factors[kDropoutBlock];
      for (int64_t at = begin; at < end; at += kDropoutBlock) {
        const int64_t n = std::min<int64_t>(kDropoutBlock, end - at);
        dropoutFactors(mask, at, n, factors);
        for (int64_t i = 0; i < n; ++i) y[at + i] = fromFloat<T>(toFloat(x[at + i]) * factors[i]);
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA
