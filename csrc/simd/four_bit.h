// Encoding and decoding 4-bit codes: two a byte, the even element in the high nibble.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/codes.h"

#if defined(__AVX512BW__)
// GCC 12 takes the undefined lanes within its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace qlora::QLORA_ISA {

#if defined(__AVX512BW__)

/// Where to look among the thresholds. x is rounded to one of 32 bins (monotonely, so its place among the thresholds
/// of other bins is known); a bin holds at most one threshold, and one comparison with that settles the rest.
struct CodeBins {
  float threshold[32];
  int32_t below[32];  // thresholds in lower bins

  constexpr CodeBins(const Thresholds& t, double scale, double shift) : threshold{}, below{} {
    for (float& bin : threshold) bin = __builtin_inff();
    for (int i = 0; i < t.count; ++i) {
      const double place = t.value[i] * scale + shift + .5;
      const int bin = static_cast<int>(place);
      // A threshold so near to a bin's edge that rounding matters, or two in one bin: no constant expression.
      if (place - bin < 1e-3 || place - bin > 1 - 1e-3 || threshold[bin] < 2) __builtin_unreachable();
      threshold[bin] = t.value[i];
      for (int b = bin + 1; b < 32; ++b) ++below[b];
    }
  }
};

template <FourBitType type>
struct CodeSearch {
  // NF4: bins of width 1/15 over [-1, 1]; FP4: 1/31 over |x|.
  static constexpr float kScale = type == FourBitType::nf4 ? 15 : 31;
  static constexpr float kShift = type == FourBitType::nf4 ? 16 : 0;
  static constexpr CodeBins kBins{type == FourBitType::nf4 ? kNf4Thresholds : kFp4Thresholds, kScale, kShift};

  const __m512 scale = _mm512_set1_ps(kScale);
  // Added, it leaves the rounded integer in the low bits of the sum, which is all that a permute reads.
  const __m512 round = _mm512_set1_ps(0x1.8p23f + kShift);
  const __m512 threshold0 = _mm512_loadu_ps(kBins.threshold), threshold1 = _mm512_loadu_ps(kBins.threshold + 16);
  const __m512i below0 = _mm512_loadu_si512(kBins.below), below1 = _mm512_loadu_si512(kBins.below + 16);
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i fp4Codes = _mm512_setr_epi32(0, 1, 6, 7, 4, 5, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0);

  QLORA_INLINE __m512i operator()(__m512 x) const {
    if constexpr (type == FourBitType::nf4) return count(x);
    const __m512i code = _mm512_permutexvar_epi32(count(_mm512_abs_ps(x)), fp4Codes);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
  }

 private:
  QLORA_INLINE __m512i count(__m512 x) const {
    const __m512i bin = _mm512_castps_si512(_mm512_fmadd_ps(x, scale, round));
    const __m512 threshold = _mm512_permutex2var_ps(threshold0, bin, threshold1);
    const __m512i below = _mm512_permutex2var_epi32(below0, bin, below1);
    return _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ), below, one);
  }
};

/// 32 elements as the 16 even and the 16 odd ones.
struct EvenOdd {
  __m512 even, odd;
};

QLORA_INLINE EvenOdd loadEvenOdd(const float* v) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 a = _mm512_loadu_ps(v), b = _mm512_loadu_ps(v + 16);
  return {_mm512_permutex2var_ps(a, even, b),
          _mm512_permutex2var_ps(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b)};
}
QLORA_INLINE EvenOdd loadEvenOdd(const bf16* v) {
  const __m512i pairs = _mm512_loadu_si512(v);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}
QLORA_INLINE EvenOdd loadEvenOdd(const f16* v) {
  const __m512i pairs = _mm512_loadu_si512(v);
  return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)),
          _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)))};
}

/// packed = codes of v * inverse, n elements: a multiple of 32.
template <FourBitType type, class T>
QLORA_INLINE void encodeFourBit(const T* v, int64_t n, float inverse, uint8_t* packed) {
  const CodeSearch<type> search;
  const __m512 scale = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < n; i += 32) {
    const EvenOdd x = loadEvenOdd(v + i);
    const __m512i even = search(_mm512_mul_ps(x.even, scale)), odd = search(_mm512_mul_ps(x.odd, scale));
    const __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(even, 4), odd);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi32_epi8(bytes));
  }
}

/// What a code stands for in a block: the 16 values rounded to T, for a permute that reads 4 index bits of a 32-bit
/// lane or 5 of a 16-bit one (so there they are twice).
template <class T>
QLORA_INLINE __m512i blockTable(const float* code, float absmax) {
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(absmax));
  const __m512i bits = _mm512_castps_si512(values);
  if constexpr (std::is_same_v<T, float>) return bits;
  if constexpr (std::is_same_v<T, f16>) {
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // As fromFloat<bf16>: AVX-512's own conversion flushes subnormal results.
  const __m512i upper = _mm512_srli_epi32(bits, 16), last = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(nearest, 16), nan, upper, _mm512_set1_epi32(0x40));
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));
}

/// Decodes as many of the n elements as it takes at a time, and says how many.
template <class T>
QLORA_INLINE int64_t decodeWhole(const uint8_t* packed, int64_t n, const float* code, float absmax, T* y) {
  const __m512i table = blockTable<T>(code, absmax);
  // The permute ignores the upper bits of an index: what else lies there does no harm.
  if constexpr (sizeof(T) == 4) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2)));
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      _mm512_storeu_si512(y + i, _mm512_permutexvar_epi32(codes, table));
    }
    return i;
  } else {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
      _mm512_storeu_si512(y + i, _mm512_permutexvar_epi16(codes, table));
    }
    return i;
  }
}

#else

/// packed = codes of v * inverse, n elements: a multiple of 32.
template <FourBitType type, class T>
QLORA_INLINE void encodeFourBit(const T* v, int64_t n, float inverse, uint8_t* packed) {
  for (int64_t i = 0; i < n; i += 32) {
    int32_t code[32];
    for (int l = 0; l < 32; ++l) code[l] = fourBitIndex<type>(toFloat(v[i + l]) * inverse);
    for (int l = 0; l < 16; ++l) packed[i / 2 + l] = static_cast<uint8_t>(code[2 * l] << 4 | code[2 * l + 1]);
  }
}

/// Decodes none: what follows takes any number.
template <class T>
QLORA_INLINE int64_t decodeWhole(const uint8_t*, int64_t, const float*, float, T*) {
  return 0;
}

#endif

/// y[i] = round_T(code[q[i]] * absmax) for the n elements of one block, which starts at a whole byte.
template <class T>
QLORA_INLINE void decodeFourBit(const uint8_t* packed, int64_t n, const float* code, float absmax, T* y) {
  int64_t i = decodeWhole(packed, n, code, absmax, y);
  if (i == n) return;
  T table[16];
  for (int c = 0; c < 16; ++c) table[c] = fromFloat<T>(code[c] * absmax);
  for (; i + 2 <= n; i += 2) {
    y[i] = table[packed[i / 2] >> 4];
    y[i + 1] = table[packed[i / 2] & 15];
  }
  if (i < n) y[i] = table[packed[i / 2] >> 4];
}

}  // namespace qlora::QLORA_ISA
