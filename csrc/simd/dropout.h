// The mask of dropout, as a function of (seed, stream, element), so that forward and backward need not store it and
// every operation that drops draws the same: element e takes word e % 4 of Philox's counter e / 4 and is kept where
// uniform(word) >= p; kept elements are scaled by 1 / (1 - p). p in [0, 1).
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/random.h"

namespace qlora {

struct DropoutMask {
  float p = 0;
  uint64_t seed = 0, stream = 0;
};

/// The factor, 0 or 1 / (1 - p), of one element.
QLORA_SHARED float dropoutFactor(const DropoutMask& mask, int64_t element) {
  const auto words = philox(mask.seed, mask.stream, static_cast<uint64_t>(element / 4));
  return uniform(words[element % 4]) >= mask.p ? 1.0f / (1.0f - mask.p) : 0.0f;
}

constexpr int kDropoutCounters = 16;                 // drawn at once
constexpr int kDropoutBlock = 4 * kDropoutCounters;  // elements

/// The factors, 0 or 1 / (1 - p), of the elements of `count` counters from `counter`; count <= kDropoutCounters.
QLORA_INLINE void dropoutBlock(const DropoutMask& mask, int64_t counter, int64_t count, float* factors) {
  uint32_t words[4][kDropoutCounters];
  for (int64_t l = 0; l < count; ++l) {
    const auto drawn = philox(mask.seed, mask.stream, static_cast<uint64_t>(counter + l));
    for (int w = 0; w < 4; ++w) words[w][l] = drawn[w];
  }
  const float scale = 1.0f / (1.0f - mask.p);
  for (int64_t l = 0; l < count; ++l) {
    for (int w = 0; w < 4; ++w) factors[4 * l + w] = uniform(words[w][l]) >= mask.p ? scale : 0.0f;
  }
}

/// The factors of elements [first, first + count), wherever that starts: factors[i] is element first + i's.
QLORA_INLINE void dropoutFactors(const DropoutMask& mask, int64_t first, int64_t count, float* factors) {
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done, skip = at % 4;
    const int64_t n = std::min(kDropoutBlock - skip, count - done);
    if (n == kDropoutBlock) {
      dropoutBlock(mask, at / 4, kDropoutCounters, factors + done);
    } else {
      float block[kDropoutBlock];
      dropoutBlock(mask, at / 4, (skip + n + 3) / 4, block);
      for (int64_t i = 0; i < n; ++i) factors[done + i] = block[skip + i];
    }
    done += n;
  }
}

}  // namespace qlora
