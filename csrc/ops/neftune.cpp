#include "ops/neftune.h"

#include <algorithm>

#include "core/random.h"

namespace qlora::QLORA_ISA {

namespace {

constexpr int64_t kTokensPerTask = 16;
constexpr int64_t kCounters = 16;  // drawn at once

}  // namespace

void neftune(Context& context, const Neftune& a) {
  const int64_t T = a.x.dim(1), C = a.x.dim(2), tokens = a.x.dim(0) * T, perToken = (C + 3) / 4;
  const float* magnitude = a.magnitude.data<float>();
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using X = decltype(zero);
    const X* x = a.x.data<X>();
    X* y = a.y.data<X>();
    context.pool.parallelFor((tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
      for (int64_t i = task * kTokensPerTask; i < std::min(tokens, (task + 1) * kTokensPerTask); ++i) {
        const uint64_t first = (static_cast<uint64_t>(i / T) << 32) + static_cast<uint64_t>(i % T * perToken);
        for (int64_t at = 0; at < perToken; at += kCounters) {
          float noise[4 * kCounters];
          for (int64_t l = 0; l < kCounters; ++l) {
            const auto words = philox(a.seed, a.stream, first + static_cast<uint64_t>(at + l));
            for (int w = 0; w < 4; ++w) noise[4 * l + w] = magnitude[i] * (2.0f * uniform(words[w]) - 1.0f);
          }
          const int64_t n = std::min(4 * kCounters, C - 4 * at), begin = i * C + 4 * at;
          for (int64_t c = 0; c < n; ++c) y[begin + c] = fromFloat<X>(toFloat(x[begin + c]) + noise[c]);
        }
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA
