// Elementwise loops on the pool, in chunks that depend on the size alone.
#pragma once

#include <algorithm>

#include "core/stream.h"

namespace qlora {

// A task of half a millisecond at most, and one that pays for handing it out.
constexpr int64_t kChunk = 16384;  // a multiple of kDropoutBlock

/// Calls body(begin, end) for consecutive ranges of [0, n).
template <class Body>
QLORA_INLINE void forChunks(Context& context, int64_t n, Body&& body) {
  context.pool.parallelFor((n + kChunk - 1) / kChunk,
                           [&](int64_t chunk, int) { body(chunk * kChunk, std::min(n, (chunk + 1) * kChunk)); });
}

}  // namespace qlora
