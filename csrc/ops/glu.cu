#include "cuda/map.h"
#include "ops/glu.h"

namespace qlora::cuda {

namespace {

template <Activation kind>
struct Gated {
  QLORA_DEVICE float operator()(int64_t, float gate, float up) const { return activate<kind>(gate).value * up; }
};

template <Activation kind, class T>
__global__ void backwardKernel(int64_t n, const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
  constexpr int count = kPack<T>;
  const auto at = [&](float d, float g, float u, T& dg, T& du) {
    const ValueAndSlope f = activate<kind>(g);
    dg = fromFloat<T>(d * u * f.slope);
    du = fromFloat<T>(d * f.value);
  };
  const int64_t packs = n / count;
  for (int64_t p = threadIndex(); p < packs; p += threadCount()) {
    const auto d = loadPack<count>(dy + p * count), g = loadPack<count>(gate + p * count);
    const auto u = loadPack<count>(up + p * count);
    Pack<T, count> dg, du;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      at(toFloat(d.value[k]), toFloat(g.value[k]), toFloat(u.value[k]), dg.value[k], du.value[k]);
    }
    storePack<count>(dgate + p * count, dg);
    storePack<count>(dup + p * count, du);
  }
  for (int64_t i = packs * count + threadIndex(); i < n; i += threadCount()) {
    at(toFloat(dy[i]), toFloat(gate[i]), toFloat(up[i]), dgate[i], dup[i]);
  }
}

}  // namespace

void gluForward(Context& context, const GluForward& a) {
  dispatchFloat(a.gate.dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatchActivation(static_cast<Activation>(a.activation), [&](auto kind) {
      map(context, a.gate.size(), Gated<decltype(kind)::value>{}, a.y.data<T>(), a.gate.data<const T>(),
          a.up.data<const T>());
    });
  });
}

void gluBackward(Context& context, const GluBackward& a) {
  dispatchFloat(a.gate.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = a.gate.size();
    dispatchActivation(static_cast<Activation>(a.activation), [&](auto kind) {
      launch(context, backwardKernel<decltype(kind)::value, T>, blocksFor(n / kPack<T> + 1), kThreads, 0, n,
             a.dy.data<T>(), a.gate.data<T>(), a.up.data<T>(), a.dgate.data<T>(), a.dup.data<T>());
    });
  });
}

}  // namespace qlora::cuda
