// Blockwise scaling, shared by every quantization: absmax = max |v| of a block, x = v * (1 / max(absmax, 1e-38)), a
// reciprocal and then a multiply. The maximum is taken over bit patterns, whose order is that of the magnitudes with
// infinity and NaN on top: so absmax is not finite exactly where some v is not.
#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.h"

namespace qlora {

QLORA_INLINE float blockAbsmax(const float* v, int64_t n) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(v[i]) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  return std::bit_cast<float>(top);
}

/// T is bf16 or f16.
template <class T>
QLORA_INLINE float blockAbsmax(const T* v, int64_t n) {
  uint16_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<uint16_t>(v[i].bits & 0x7fff);
    top = magnitude > top ? magnitude : top;
  }
  return toFloat(T{top});
}

QLORA_SHARED float blockInverse(float absmax) { return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax); }

QLORA_SHARED bool isFinite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7fffffff) < 0x7f800000; }

/// The first of n absmax values that is not finite, else n.
QLORA_INLINE int64_t firstNonFinite(const float* absmax, int64_t n) {
  int64_t i = 0;
  while (i < n && isFinite(absmax[i])) ++i;
  return i;
}

}  // namespace qlora
