// Helpers for loops that the compiler vectorizes, the same for every instruction set: sums are kept in a fixed number
// of lanes and folded in a fixed order, so their bits do not depend on the width of the machine's registers.
#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.h"

namespace qlora {

constexpr int kLanes = 16;

/// sum over i < n of value(i), in kLanes partial sums.
template <class F>
QLORA_INLINE float laneSum(int64_t n, F&& value) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += value(i + l);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += value(i + l);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

/// e^x to within 2 units in the last place; 0 below about -87.3, infinity above 88.7. x is split into n ln 2 + r with
/// |r| <= ln 2 / 2, e^r is a polynomial (coefficients: minimax on that interval), and 2^n is made from its bits.
QLORA_SHARED float fastExp(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
  const float n = __builtin_floorf(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t k = static_cast<int32_t>(n);
  // 2^n in two factors: n may be 128, which no single fp32 exponent holds.
  const float half = std::bit_cast<float>(static_cast<uint32_t>((k / 2 + 127) << 23));
  const float rest = std::bit_cast<float>(static_cast<uint32_t>((k - k / 2 + 127) << 23));
  const float y = p * half * rest;
  return x < -87.3f ? 0.0f : (x > 88.7f ? __builtin_inff() : (x != x ? x : y));
}

}  // namespace qlora
