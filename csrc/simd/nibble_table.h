// Decoding 4-bit weights to fp32 lanes: the sixteen values of a block, scaled and rounded to the compute type once, are
// a table in registers, and a group of 2 * kVector weights is looked up in it, evens and odds apart.
#pragma once

#include <algorithm>

#include "simd/nibbles.h"

namespace qlora::QLORA_ISA {

/// Sixteen floats, looked up by the 4 bits of each weight.
class NibbleTable {
 public:
  /// table[q] = round_T(code[q] * absmax)
  template <class T>
  QLORA_INLINE static NibbleTable scaled(const float* code, float absmax) {
    alignas(64) float values[16];
    for (int q = 0; q < 16; ++q) values[q] = toFloat(fromFloat<T>(code[q] * absmax));
    NibbleTable table;
    for (int i = 0; i < kParts; ++i) table.part_[i] = load(values + i * kVector);
    return table;
  }

  /// kVector bytes: the weights in their high halves are the even ones.
  QLORA_INLINE void lookUp(const uint8_t* bytes, Vector& even, Vector& odd) const {
#if QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
    const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    even = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), part_[0]);
    odd = _mm512_permutexvar_ps(w, part_[0]);
#elif QLORA_ISA_avx2
    // Each half of the table by the low three bits; the fourth, moved to the sign, chooses the half.
    const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i high = _mm256_srli_epi32(w, 4);
    even = _mm256_blendv_ps(_mm256_permutevar8x32_ps(part_[0], high), _mm256_permutevar8x32_ps(part_[1], high),
                            _mm256_castsi256_ps(_mm256_slli_epi32(w, 24)));
    odd = _mm256_blendv_ps(_mm256_permutevar8x32_ps(part_[0], w), _mm256_permutevar8x32_ps(part_[1], w),
                           _mm256_castsi256_ps(_mm256_slli_epi32(w, 28)));
#else
    const float* values = reinterpret_cast<const float*>(part_);
    for (int l = 0; l < kVector; ++l) {
      even[l] = values[bytes[l] >> 4];
      odd[l] = values[bytes[l] & 15];
    }
#endif
  }

 private:
  static constexpr int kParts = 16 / kVector;

  Vector part_[kParts];
};

/// Calls f(c, even, odd) for each group of columns [j + c, j + c + 2 * kVector) of row i; j and n are whole groups.
template <class T, class F>
QLORA_INLINE void forEachVectorGroup(const Nibbles& w, int64_t i, int64_t j, int64_t n, F&& f) {
  const int64_t begin = i * w.K + j, end = begin + n;
  for (int64_t flat = begin; flat < end;) {
    const int64_t block = flat >> w.shift, stop = std::min(end, (block + 1) << w.shift);
    const float absmax = w.absmax ? w.scale<AbsmaxKind::plain>(block) : w.scale<AbsmaxKind::nested>(block);
    const NibbleTable table = NibbleTable::scaled<T>(w.code, absmax);
    for (; flat < stop; flat += 2 * kVector) {
      Vector even, odd;
      table.lookUp(w.data + (flat >> 1), even, odd);
      f(flat - begin, even, odd);
    }
  }
}

}  // namespace qlora::QLORA_ISA
