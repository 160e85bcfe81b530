// How an optimizer keeps a list of state, as what a kernel does with a block of at most 256 elements: load gives it in
// fp32, store takes back what the rule made of it.
//
// In 8 bits: the nearest entry of the map to x / absmax, and two guards. Where a signed entry has another sign bit than
// x it moves by one towards x, so that a small negative does not become the zero. An unsigned x above 0 never takes the
// zero: a second moment of 0 would turn the next step into m / eps.
#pragma once

#include <cstdint>

#include "core/codes.h"
#include "simd/block_scale.h"
#include "simd/dynamic_map.h"

namespace qlora {

/// fp32 values, which the rule changes in place.
struct FullState {
  static constexpr int kArrays = 1;

  static QLORA_INLINE float* load(char* const* memory, int64_t at, int64_t, float*) {
    return reinterpret_cast<float*>(memory[0]) + at;
  }
  static QLORA_INLINE void store(char* const*, int64_t, int64_t, const float*) {}
};

/// An index an element and an absmax a block.
template <DynamicMapKind kind>
struct ByteState {
  static constexpr int kArrays = 2;

  static QLORA_INLINE float* load(char* const* memory, int64_t at, int64_t n, float* values) {
    const DynamicMap& map = dynamicMap(kind);
    const uint8_t* index = reinterpret_cast<const uint8_t*>(memory[0]) + at;
    const float absmax = reinterpret_cast<const float*>(memory[1])[at / kDynamicBlock];
    // Before the first step the indices say nothing yet.
    for (int64_t i = 0; i < n; ++i) values[i] = absmax == 0.0f ? 0.0f : map.code[index[i]] * absmax;
    return values;
  }
  static QLORA_INLINE void store(char* const* memory, int64_t at, int64_t n, const float* values) {
    const DynamicMap& map = dynamicMap(kind);
    uint8_t* index = reinterpret_cast<uint8_t*>(memory[0]) + at;
    const float absmax = blockAbsmax(values, n), inverse = blockInverse(absmax);
    reinterpret_cast<float*>(memory[1])[at / kDynamicBlock] = absmax;
    for (int64_t i = 0; i < n; ++i) {
      index[i] = guardedIndex<kind>(map, values[i], dynamicIndex(map, values[i] * inverse));
    }
  }
};

using SignedBytes = ByteState<DynamicMapKind::signedMap>;
using UnsignedBytes = ByteState<DynamicMapKind::unsignedMap>;

}  // namespace qlora
