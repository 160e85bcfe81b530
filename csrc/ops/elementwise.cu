#include "core/random.h"
#include "cuda/map.h"
#include "ops/elementwise.h"
#include "simd/dropout.h"

namespace qlora::cuda {

namespace {

template <class T>
__global__ void fillKernel(T* x, int64_t n, T value) {
  for (int64_t i = threadIndex(); i < n; i += threadCount()) x[i] = value;
}

template <class T>
void fillWith(Context& context, const Tensor& t, T value) {
  const int64_t n = t.size();
  launch(context, fillKernel<T>, blocksFor(n), kThreads, 0, t.data<T>(), n, value);
}

struct Plus {
  QLORA_DEVICE float operator()(int64_t, float a, float b) const { return a + b; }
};

struct Times {
  float factor;
  QLORA_DEVICE float operator()(int64_t, float x) const { return x * factor; }
};

struct TimesStored {
  const float* factor;
  QLORA_DEVICE float operator()(int64_t, float x) const { return x * *factor; }
};

/// Each thread draws the counter of its element again: four elements share one, and a thread has whole ones.
struct Drop {
  DropoutMask mask;
  QLORA_DEVICE float operator()(int64_t i, float x) const { return x * dropoutFactor(mask, i); }
};

template <class F>
void mapSame(Context& context, const Tensor& x, const Tensor& y, F f) {
  dispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    map(context, x.size(), f, y.data<T>(), x.data<const T>());
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
    map(context, a.a.size(), Plus{}, a.y.data<T>(), a.a.data<const T>(), a.b.data<const T>());
  });
}

void scale(Context& context, const Scale& a) { mapSame(context, a.x, a.y, Times{a.factor}); }

void scaleByTensor(Context& context, const ScaleByTensor& a) {
  mapSame(context, a.x, a.y, TimesStored{a.factor.data<const float>()});
}

void dropout(Context& context, const Dropout& a) { mapSame(context, a.x, a.y, Drop{{a.p, a.seed, a.stream}}); }

}  // namespace qlora::cuda
