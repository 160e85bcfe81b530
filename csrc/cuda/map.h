// y[i] = f(i, x[i], ...) over arrays that begin at 16-byte boundaries, as tensors do.
#pragma once

#include "cuda/device.h"

namespace qlora {

namespace detail {

template <int count, class F, class Y, class... X>
QLORA_DEVICE void mapPack(const F& f, int64_t first, Y* y, const Pack<X, count>&... x) {
  Pack<Y, count> out;
#pragma unroll
  for (int k = 0; k < count; ++k) out.value[k] = fromFloat<Y>(f(first + k, toFloat(x.value[k])...));
  storePack<count>(y + first, out);
}

template <int count, class F, class Y, class... X>
__global__ void mapKernel(int64_t n, F f, Y* y, const X*... x) {
  beginEarly();
  const int64_t packs = n / count;
  for (int64_t p = threadIndex(); p < packs; p += threadCount()) {
    mapPack<count>(f, p * count, y, loadPack<count>(x + p * count)...);
  }
  for (int64_t i = packs * count + threadIndex(); i < n; i += threadCount()) {
    y[i] = fromFloat<Y>(f(i, toFloat(x[i])...));
  }
}

}  // namespace detail

/// f is an object with `QLORA_DEVICE float operator()(int64_t i, float x, ...) const`.
template <class F, class Y, class... X>
void map(const Context& context, int64_t n, F f, Y* y, const X*... x) {
  constexpr int count = 16 / std::max({sizeof(Y), sizeof(X)...});
  void (*const kernel)(int64_t, F, Y*, const X*...) = detail::mapKernel<count, F, Y, X...>;
  launchEarly(context, kernel, blocksFor(n / count + 1), kThreads, 0, n, f, y, x...);
}

}  // namespace qlora
