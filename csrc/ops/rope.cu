// A block turns the heads of a row; for a cache, where rows may be as few as one, some of them.
#include "cuda/rows.h"
#include "ops/rope.h"

namespace qlora::cuda {

namespace {

constexpr int64_t kMostBlocksOfRow = 64;

__global__ void tableKernel(int64_t n, int half, const int32_t* positions, const float* frequencies, float* cosines,
                            float* sines, float factor) {
  for (int64_t i = threadIndex(); i < n; i += threadCount()) {
    const float angle = static_cast<float>(positions[i / half]) * frequencies[i % half];
    cosines[i] = cosf(angle) * factor;
    sines[i] = sinf(angle) * factor;
  }
}

/// Of a head's D elements: those before `half` bring their partner along, so that it has D - half items.
template <class T>
QLORA_DEVICE void turnItem(int r, int half, const T* x, const float* c, const float* s, T* y, float direction) {
  if (r >= half) {
    y[half + r] = x[half + r];
    return;
  }
  const float first = toFloat(x[r]), second = toFloat(x[r + half]), sine = direction * s[r];
  y[r] = fromFloat<T>(first * c[r] - second * sine);
  y[r + half] = fromFloat<T>(second * c[r] + first * sine);
}

template <class T>
__global__ void turnKernel(int64_t M, int H, int D, int half, const T* x, const float* cosines, const float* sines,
                           T* y, float direction) {
  beginEarly();
  const int items = D - half;
  for (int64_t m = blockIdx.x; m < M; m += gridDim.x) {
    const float *c = cosines + m * half, *s = sines + m * half;
    for (int i = static_cast<int>(threadIdx.x); i < H * items; i += static_cast<int>(blockDim.x)) {
      const int64_t head = (m * H + i / items) * D;
      turnItem(i % items, half, x + head, c, s, y + head, direction);
    }
  }
}

template <class T>
struct NewTokens {
  int64_t M, perRow, cached;  // tokens: all, of a sequence, that the cache has room for
  int H, G, D, half;
  const T *q, *k, *v;
  const float *cosines, *sines;
  const int32_t* at;
  T *turned, *keys, *values;
};

/// Heads of q, k and v in this order. A sequence that the cache has no room for is left out of it.
template <class T>
__global__ void appendKernel(NewTokens<T> a) {
  beginEarly();
  const int items = a.D - a.half;
  for (int64_t m = blockIdx.x; m < a.M; m += gridDim.x) {
    const float *c = a.cosines + m * a.half, *s = a.sines + m * a.half;
    const int64_t b = m / a.perRow, begin = a.at[b], token = b * a.cached + begin + m % a.perRow;
    const bool fits = begin >= 0 && begin + a.perRow <= a.cached;
    for (int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); i < (a.H + 2 * a.G) * items;
         i += static_cast<int>(gridDim.y * blockDim.x)) {
      const int head = i / items, r = i % items;
      if (head < a.H) {
        const int64_t own = (m * a.H + head) * a.D;
        turnItem(r, a.half, a.q + own, c, s, a.turned + own, 1.0f);
        continue;
      }
      if (!fits) continue;
      const int ofCache = (head - a.H) % a.G;
      const int64_t from = (m * a.G + ofCache) * a.D, to = (token * a.G + ofCache) * a.D;
      if (head < a.H + a.G) {
        turnItem(r, a.half, a.k + from, c, s, a.keys + to, 1.0f);
        continue;
      }
      if (r < a.half) a.values[to + r] = a.v[from + r];
      a.values[to + a.half + r] = a.v[from + a.half + r];
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

/// Places that JavaScript wrote are checked before the launch, as on the CPU; those of another origin by the kernel.
void ropeAppend(Context& context, const RopeAppend& a) {
  if (a.at.storage->hostCopy) {
    for (const int32_t at : hostValues(context, a.at)) a.checkPlace(at);
  }
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    const NewTokens<T> tokens{.M = a.cos.dim(0),
                              .perRow = a.q.dim(1),
                              .cached = a.keys.dim(1),
                              .H = static_cast<int>(a.q.dim(2)),
                              .G = static_cast<int>(a.k.dim(2)),
                              .D = static_cast<int>(a.q.dim(3)),
                              .half = static_cast<int>(a.cos.dim(1)),
                              .q = a.q.data<T>(),
                              .k = a.k.data<T>(),
                              .v = a.v.data<T>(),
                              .cosines = a.cos.data<float>(),
                              .sines = a.sin.data<float>(),
                              .at = a.at.data<int32_t>(),
                              .turned = a.turned.data<T>(),
                              .keys = a.keys.data<T>(),
                              .values = a.values.data<T>()};
    const int64_t items = (tokens.H + 2 * tokens.G) * int64_t{tokens.D - tokens.half};
    const dim3 grid(static_cast<unsigned>(rowBlocks(tokens.M)),
                    static_cast<unsigned>(std::min<int64_t>((items + kThreads - 1) / kThreads, kMostBlocksOfRow)));
    launchEarly(context, appendKernel<T>, grid, kThreads, 0, tokens);
  });
}

}  // namespace qlora::cuda
