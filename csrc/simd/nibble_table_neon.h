// Decoding 4-bit weights on NEON: the sixteen values of a block, scaled and rounded to the compute type once, lie in
// registers as planes of bytes, and vqtbl1q_u8 looks sixteen weights up in a plane. An fp32 table takes four planes; of
// values rounded to 16 bits two are enough, which a zip puts together and a shift (bf16) or conversion (f16) widens.
//
// Sixteen bytes hold 32 weights, or four groups of 2 * kVector. A weight costs about half an instruction.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd/nibbles.h"

namespace qlora::QLORA_ISA {

/// Sixteen weights' values, or the sixteen that a table holds.
struct Sixteen {
  float32x4_t part[4];
};

QLORA_INLINE Sixteen loadSixteen(const float* p) {
  return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}

/// round_T(code[q] * absmax) in planes.
template <class T>
class NibblePlanes {
 public:
  static constexpr int kPlanes = std::is_same_v<T, float> ? 4 : 2;

  QLORA_INLINE NibblePlanes(const Sixteen& code, float absmax) {
    Sixteen scaled;
    for (int i = 0; i < 4; ++i) scaled.part[i] = vmulq_n_f32(code.part[i], absmax);
    if constexpr (kPlanes == 4) {
      const uint8x16_t low[2] = {evens(bytes(scaled, 0), bytes(scaled, 1)), evens(bytes(scaled, 2), bytes(scaled, 3))};
      const uint8x16_t high[2] = {odds(bytes(scaled, 0), bytes(scaled, 1)), odds(bytes(scaled, 2), bytes(scaled, 3))};
      plane_[0] = evens(low[0], low[1]);
      plane_[1] = evens(high[0], high[1]);
      plane_[2] = odds(low[0], low[1]);
      plane_[3] = odds(high[0], high[1]);
    } else {
      const uint8x16_t first = rounded(scaled.part[0], scaled.part[1]), last = rounded(scaled.part[2], scaled.part[3]);
      plane_[0] = evens(first, last);
      plane_[1] = odds(first, last);
    }
  }

  QLORA_INLINE Sixteen lookUp(uint8x16_t index) const {
    Sixteen values;
    if constexpr (kPlanes == 4) {
      const uint8x16_t a = vqtbl1q_u8(plane_[0], index), b = vqtbl1q_u8(plane_[1], index);
      const uint8x16_t c = vqtbl1q_u8(plane_[2], index), d = vqtbl1q_u8(plane_[3], index);
      const uint16x8_t low[2] = {halves(vzip1q_u8(a, b)), halves(vzip2q_u8(a, b))};
      const uint16x8_t high[2] = {halves(vzip1q_u8(c, d)), halves(vzip2q_u8(c, d))};
      for (int i = 0; i < 2; ++i) {
        values.part[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(low[i], high[i]));
        values.part[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[i], high[i]));
      }
    } else {
      uint16x8_t pairs[2];
      lookUp(index, pairs);
      for (int i = 0; i < 2; ++i) {
        values.part[2 * i] = widened(vget_low_u16(pairs[i]));
        values.part[2 * i + 1] = widened(vget_high_u16(pairs[i]));
      }
    }
    return values;
  }

  /// The bits of sixteen values of 16 bits.
  QLORA_INLINE void lookUp(uint8x16_t index, uint16x8_t (&values)[2]) const {
    static_assert(kPlanes == 2);
    const uint8x16_t a = vqtbl1q_u8(plane_[0], index), b = vqtbl1q_u8(plane_[1], index);
    values[0] = halves(vzip1q_u8(a, b));
    values[1] = halves(vzip2q_u8(a, b));
  }

 private:
  QLORA_INLINE static uint8x16_t bytes(const Sixteen& x, int i) { return vreinterpretq_u8_f32(x.part[i]); }
  QLORA_INLINE static uint8x16_t evens(uint8x16_t a, uint8x16_t b) { return vuzp1q_u8(a, b); }
  QLORA_INLINE static uint8x16_t odds(uint8x16_t a, uint8x16_t b) { return vuzp2q_u8(a, b); }
  QLORA_INLINE static uint16x8_t halves(uint8x16_t x) { return vreinterpretq_u16_u8(x); }

  /// Eight values as T.
  QLORA_INLINE static uint8x16_t rounded(float32x4_t a, float32x4_t b) {
    if constexpr (std::is_same_v<T, bf16>) {
      return vreinterpretq_u8_u16(vshrn_high_n_u32(vshrn_n_u32(nearestBf16(a), 16), nearestBf16(b), 16));
    } else {
      return vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(a), b));
    }
  }
  /// As fromFloat<bf16>, in the upper half.
  QLORA_INLINE static uint32x4_t nearestBf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), last);
    return vbslq_u32(vceqq_f32(x, x), nearest, vorrq_u32(bits, vdupq_n_u32(0x400000)));
  }
  QLORA_INLINE static float32x4_t widened(uint16x4_t x) {
    if constexpr (std::is_same_v<T, bf16>) return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
    return vcvt_f32_f16(vreinterpret_f16_u16(x));
  }

  uint8x16_t plane_[kPlanes];
};

/// Calls f(c, even, odd) for each group of columns [j + c, j + c + 2 * kVector) of row i; j and n are whole groups.
template <class T, class F>
QLORA_INLINE void forEachVectorGroup(const Nibbles& w, int64_t i, int64_t j, int64_t n, F&& f) {
  constexpr int64_t kGroup = 2 * kVector, kWide = 32;
  const uint8x16_t four = vdupq_n_u8(15);
  const Sixteen code = loadSixteen(w.code);
  const int64_t begin = i * w.K + j, end = begin + n;
  for (int64_t flat = begin; flat < end;) {
    const int64_t block = flat >> w.shift, stop = std::min(end, (block + 1) << w.shift);
    const float absmax = w.absmax ? w.scale<AbsmaxKind::plain>(block) : w.scale<AbsmaxKind::nested>(block);
    const NibblePlanes<T> planes(code, absmax);
    for (; flat + kWide <= stop; flat += kWide) {
      const uint8x16_t bytes = vld1q_u8(w.data + (flat >> 1));
      const Sixteen even = planes.lookUp(vshrq_n_u8(bytes, 4)), odd = planes.lookUp(vandq_u8(bytes, four));
      for (int g = 0; g < 4; ++g) f(flat - begin + g * kGroup, even.part[g], odd.part[g]);
    }
    for (; flat < stop; flat += kGroup) {
      uint32_t word;
      __builtin_memcpy(&word, w.data + (flat >> 1), sizeof word);
      const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(word));
      const Sixteen even = planes.lookUp(vshrq_n_u8(bytes, 4)), odd = planes.lookUp(vandq_u8(bytes, four));
      f(flat - begin, even.part[0], odd.part[0]);
    }
  }
}

}  // namespace qlora::QLORA_ISA
