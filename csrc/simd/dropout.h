// The mask of dropout, as a function of (seed, stream, element), so that forward and backward need not store it and
// every operation that drops draws the same: element e takes word e % 4 of Philox's counter e / 4 and is kept where
// uniform(word) >= p; kept elements are scaled by 1 / (1 - p). p in [0, 1).
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/random.h"

namespace qlora {

struct DropoutMask {
  float p;
  uint64_t seed, stream;
};

constexpr int kDropoutBlock = 64;  // elements drawn at once, from 16 counters

/// The factors of elements [64 block, 64 block + 64): 0 or 1 / (1 - p).
QLORA_INLINE void dropoutBlock(const DropoutMask& mask, int64_t block, float* factors) {
  constexpr int kCounters = kDropoutBlock / 4;
  uint32_t words[4][kCounters];
  const uint64_t first = static_cast<uint64_t>(block) * kCounters;
  for (int l = 0; l < kCounters; ++l) {
    const auto drawn = philox(mask.seed, mask.stream, first + static_cast<uint64_t>(l));
    for (int w = 0; w < 4; ++w) words[w][l] = drawn[w];
  }
  const float scale = 1.0f / (1.0f - mask.p);
  for (int l = 0; l < kCounters; ++l) {
    for (int w = 0; w < 4; ++w) factors[4 * l + w] = uniform(words[w][l]) >= mask.p ? scale : 0.0f;
  }
}

/// The factors of elements [first, first + count), wherever that starts: factors[i] is element first + i's.
QLORA_INLINE void dropoutFactors(const DropoutMask& mask, int64_t first, int64_t count, float* factors) {
  for (int64_t at = first; at < first + count;) {
    const int64_t block = at / kDropoutBlock, skip = at % kDropoutBlock;
    const int64_t n = std::min(kDropoutBlock - skip, first + count - at);
    if (n == kDropoutBlock) {
      dropoutBlock(mask, block, factors + (at - first));
    } else {
      float whole[kDropoutBlock];
      dropoutBlock(mask, block, whole);
      for (int64_t i = 0; i < n; ++i) factors[at - first + i] = whole[skip + i];
    }
    at += n;
  }
}

}  // namespace qlora
