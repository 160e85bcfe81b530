// Rounding to a dynamic 8-bit map (core/codes.h), for double quantization and for 8-bit optimizer state.
#pragma once

#include <bit>
#include <cstdint>

#include "core/codes.h"

namespace qlora {

constexpr int64_t kDynamicBlock = 256;

/// The nearest entry of the map to x in [-1, 1]; a tie takes the even index.
QLORA_SHARED uint8_t dynamicIndex(const DynamicMap& map, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  int32_t key = static_cast<int32_t>((bits & 0x7fffffff) >> 16) - (DynamicMap::kLowestKey - 1);
  key = key < 0 ? 0 : (key >= DynamicMap::kKeys ? DynamicMap::kKeys - 1 : key);
  const uint8_t first = map.first[bits >> 31][key];
  return static_cast<uint8_t>(first + (x > map.threshold[first] ? 1 : 0));
}

/// The entry that optimizer state takes for `value` instead of the nearest, `index` (simd/dynamic_state.h says why).
template <DynamicMapKind kind>
QLORA_SHARED uint8_t guardedIndex(const DynamicMap& map, float value, uint8_t index) {
  if constexpr (kind == DynamicMapKind::unsignedMap) {
    return index == 0 && value > 0 ? 1 : index;
  } else {
    const bool wrong = ((std::bit_cast<uint32_t>(map.code[index]) ^ std::bit_cast<uint32_t>(value)) >> 31) != 0;
    return wrong ? static_cast<uint8_t>(value > 0 ? index + 1 : index - 1) : index;
  }
}

}  // namespace qlora
