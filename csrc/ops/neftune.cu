#include "core/random.h"
#include "cuda/device.h"
#include "ops/neftune.h"

namespace qlora::cuda {

namespace {

/// A thread draws a counter: the noise of four columns of a token.
template <class X>
__global__ void noiseKernel(int64_t tokens, int64_t T, int64_t C, const X* x, const float* magnitude, X* y,
                            uint64_t seed, uint64_t stream) {
  const int64_t perToken = (C + 3) / 4;
  for (int64_t q = threadIndex(); q < tokens * perToken; q += threadCount()) {
    const int64_t i = q / perToken, at = q % perToken;
    const uint64_t first = (static_cast<uint64_t>(i / T) << 32) + static_cast<uint64_t>(i % T * perToken);
    const auto words = philox(seed, stream, first + static_cast<uint64_t>(at));
    for (int k = 0; k < 4 && 4 * at + k < C; ++k) {
      const int64_t e = i * C + 4 * at + k;
      y[e] = fromFloat<X>(toFloat(x[e]) + magnitude[i] * (2.0f * uniform(words[k]) - 1.0f));
    }
  }
}

}  // namespace

void neftune(Context& context, const Neftune& a) {
  const int64_t T = a.x.dim(1), C = a.x.dim(2), tokens = a.x.dim(0) * T;
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using X = decltype(zero);
    launch(context, noiseKernel<X>, blocksFor(tokens * ((C + 3) / 4)), kThreads, 0, tokens, T, C, a.x.data<X>(),
           a.magnitude.data<float>(), a.y.data<X>(), a.seed, a.stream);
  });
}

}  // namespace qlora::cuda
