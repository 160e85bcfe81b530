#include "ops/key_value_cache.h"

#include <algorithm>
#include <cstring>

namespace qlora::QLORA_ISA {

namespace {

// Tokens that a task moves: of all rows they fit into a core's cache.
constexpr int64_t kGatherTokens = 16;

int64_t bytesOfToken(const Tensor& cache) {
  return cache.dim(2) * cache.dim(3) * static_cast<int64_t>(sizeOf(cache.dtype));
}

}  // namespace

void gatherKeyValue(Context& context, const GatherKeyValue& a) {
  const int64_t B = a.cache.dim(0), token = bytesOfToken(a.cache);
  const int64_t sourceBytes = a.source.dim(1) * token, cacheBytes = a.cache.dim(1) * token;
  const int32_t* from = a.from.data<int32_t>();
  for (int64_t b = 0; b < B; ++b) {
    if (from[b] < -1 || from[b] >= a.source.dim(0)) {
      fail("ERR_QLORA_ARGUMENT", "gatherKeyValue: from[%lld] must be from -1 to %lld, got %d",
           static_cast<long long>(b), static_cast<long long>(a.source.dim(0) - 1), from[b]);
    }
  }
  const char* source = a.source.data<char>();
  char* cache = a.cache.data<char>();
  const int64_t stride = kGatherTokens * token;
  char* heldOfThread = context.scratch.take<char>(context.pool.size() * B * stride);
  context.pool.parallelFor((a.end - a.begin + kGatherTokens - 1) / kGatherTokens, [&](int64_t task, int thread) {
    const int64_t first = a.begin + task * kGatherTokens, bytes = std::min(kGatherTokens, a.end - first) * token;
    // All rows are read before the first is written: source may be the cache.
    char* held = heldOfThread + thread * B * stride;
    for (int64_t b = 0; b < B; ++b) {
      if (from[b] < 0) continue;
      std::memcpy(held + b * stride, source + from[b] * sourceBytes + first * token, bytes);
    }
    for (int64_t b = 0; b < B; ++b) {
      if (from[b] >= 0) std::memcpy(cache + b * cacheBytes + first * token, held + b * stride, bytes);
    }
  });
}

}  // namespace qlora::QLORA_ISA
