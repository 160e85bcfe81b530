#include "ops/random_uniform.h"

#include <algorithm>

#include "core/random.h"

namespace qlora::QLORA_ISA {

void randomUniform(Context& context, const RandomUniform& a) {
  constexpr int64_t kBlock = 4096;  // a multiple of 4
  const int64_t n = a.y.size();
  float* y = a.y.data<float>();
  context.pool.parallelFor((n + kBlock - 1) / kBlock, [&](int64_t task, int) {
    for (int64_t i = task * kBlock; i < std::min(n, (task + 1) * kBlock); i += 4) {
      const auto words = philox(a.seed, a.stream, static_cast<uint64_t>(i / 4));
      for (int64_t j = 0; j < 4 && i + j < n; ++j) y[i + j] = a.low + (a.high - a.low) * uniform(words[j]);
    }
  });
}

}  // namespace qlora::QLORA_ISA
