// A block turns the heads of a row.
#include "cuda/rows.h"
#include "ops/rope.h"

namespace qlora::cuda {

namespace {

__global__ void tableKernel(int64_t n, int half, const int32_t* positions, const float* frequencies, float* cosines,
                            float* sines, float factor) {
  for (int64_t i = threadIndex(); i < n; i += threadCount()) {
    const float angle = static_cast<float>(positions[i / half]) * frequencies[i % half];
    cosines[i] = cosf(angle) * factor;
    sines[i] = sinf(angle) * factor;
  }
}

/// The first D - half elements of a head: those before `half` bring their partner along, the others are copied.
template <class T>
__global__ void turnKernel(int64_t M, int H, int D, int half, const T* x, const float* cosines, const float* sines,
                           T* y, float direction) {
  beginEarly();
  const int items = D - half;
  for (int64_t m = blockIdx.x; m < M; m += gridDim.x) {
    const float *c = cosines + m * half, *s = sines + m * half;
    for (int i = static_cast<int>(threadIdx.x); i < H * items; i += static_cast<int>(blockDim.x)) {
      const int64_t head = (m * H + i / items) * D;
      const int r = i % items;
      if (r >= half) {
        y[head + half + r] = x[head + half + r];
        continue;
      }
      const float first = toFloat(x[head + r]), second = toFloat(x[head + r + half]), sine = direction * s[r];
      y[head + r] = fromFloat<T>(first * c[r] - second * sine);
      y[head + r + half] = fromFloat<T>(second * c[r] + first * sine);
    }
  }
}

}  // namespace

void ropeTable(Context& context, const RopeTable& a) {
  const int64_t n = a.cos.size();
  launch(context, tableKernel, blocksFor(n), kThreads, 0, n, static_cast<int>(a.inverseFrequencies.dim(0)),
         a.positions.data<int32_t>(), a.inverseFrequencies.data<float>(), a.cos.data<float>(), a.sin.data<float>(),
         a.factor);
}

void rope(Context& context, const Rope& a) {
  const int64_t M = a.cos.dim(0);
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    launchEarly(context, turnKernel<T>, rowBlocks(M), kThreads, 0, M, static_cast<int>(a.x.dim(-2)),
                static_cast<int>(a.x.dim(-1)), static_cast<int>(a.cos.dim(1)), a.x.data<T>(), a.cos.data<float>(),
                a.sin.data<float>(), a.y.data<T>(), a.direction);
  });
}

}  // namespace qlora::cuda
