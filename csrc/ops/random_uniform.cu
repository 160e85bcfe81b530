#include "core/random.h"
#include "cuda/device.h"
#include "ops/random_uniform.h"

namespace qlora::cuda {

namespace {

/// A thread draws a counter: four numbers.
__global__ void uniformKernel(int64_t n, float* y, float low, float high, uint64_t seed, uint64_t stream) {
  for (int64_t q = threadIndex(); 4 * q < n; q += threadCount()) {
    const auto words = philox(seed, stream, static_cast<uint64_t>(q));
    for (int k = 0; k < 4 && 4 * q + k < n; ++k) y[4 * q + k] = low + (high - low) * uniform(words[k]);
  }
}

}  // namespace

void randomUniform(Context& context, const RandomUniform& a) {
  const int64_t n = a.y.size();
  launch(context, uniformKernel, blocksFor((n + 3) / 4), kThreads, 0, n, a.y.data<float>(), a.low, a.high, a.seed,
         a.stream);
}

}  // namespace qlora::cuda
