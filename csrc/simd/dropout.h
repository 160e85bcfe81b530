// Dropout's factors as a function of (seed, stream, element): drawn again in the backward, never stored.
#pragma once

#include "core/random.h"
#include "simd/gemm.h"

namespace qlora::QLORA_ISA {

/// factor[i] = 0 or 1 / (1 - p) of elements [first, first + n): word e % 4 of counter e / 4 decides element e.
inline void dropoutFactors(const Dropout& d, int64_t first, int64_t n, float* factor) {
  const float keep = 1.0f / (1.0f - d.p);
  for (int64_t i = 0; i < n;) {
    const int64_t e = first + i;
    const auto words = philox(d.seed, d.stream, static_cast<uint64_t>(e >> 2));
    for (int64_t word = e & 3; word < 4 && i < n; ++word, ++i) {
      factor[i] = uniform(words[static_cast<size_t>(word)]) < d.p ? 0.0f : keep;
    }
  }
}

}  // namespace qlora::QLORA_ISA
