// One register of fp32 lanes of the instruction set that is being compiled for.
#pragma once

#include <cstdint>

#include "core/dtype.h"

#if QLORA_ISA_avx2 || QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
// gcc 12 takes the undefined pass-through operand of its own AVX-512 intrinsics for an uninitialized variable.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif QLORA_NEON
#include <arm_neon.h>
#endif

namespace qlora::QLORA_ISA {

#if QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
constexpr int kVector = 16, kRegisters = 32;
#elif QLORA_ISA_avx2
constexpr int kVector = 8, kRegisters = 16;
#elif QLORA_NEON
constexpr int kVector = 4, kRegisters = 32;
#else
constexpr int kVector = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(kVector * 4)));
typedef float UnalignedVector __attribute__((vector_size(kVector * 4), aligned(4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(kVector * 4)));
typedef int32_t UnalignedIntVector __attribute__((vector_size(kVector * 4), aligned(4), may_alias));

QLORA_INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
QLORA_INLINE IntVector load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVector*>(p); }
QLORA_INLINE void store(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }
QLORA_INLINE Vector broadcast(float x) {
#if QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
  return _mm512_set1_ps(x);
#elif QLORA_ISA_avx2
  return _mm256_set1_ps(x);
#else
  return Vector{x, x, x, x};
#endif
}

/// a * b + c, fused where the instruction set fuses.
QLORA_INLINE Vector multiplyAdd(Vector a, Vector b, Vector c) {
#if QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
  return _mm512_fmadd_ps(a, b, c);
#elif QLORA_ISA_avx2
  return _mm256_fmadd_ps(a, b, c);
#elif QLORA_NEON
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

/// b where either is NaN.
QLORA_INLINE Vector maximum(Vector a, Vector b) {
#if QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
  return _mm512_max_ps(a, b);
#elif QLORA_ISA_avx2
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

/// Transposes kVector rows of kVector floats, `from` apart, into rows that lie `to` apart.
QLORA_INLINE void transpose(const float* in, int64_t from, float* out, int64_t to) {
#if QLORA_ISA_avx512 || QLORA_ISA_avx512bf16
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * from);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // r[4 g + c], 128-bit lane l: column 4 l + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88),
                 high01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(out + c * to, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + (c + 8) * to, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(out + (c + 4) * to, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + (c + 12) * to, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
#elif QLORA_ISA_avx2
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * from);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * to, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(out + (c + 4) * to, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
#elif QLORA_NEON
  const float32x4_t r0 = vld1q_f32(in), r1 = vld1q_f32(in + from);
  const float32x4_t r2 = vld1q_f32(in + 2 * from), r3 = vld1q_f32(in + 3 * from);
  const float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)),
                    odd01 = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
  const float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)),
                    odd23 = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
  vst1q_f32(out, vreinterpretq_f32_f64(vtrn1q_f64(even01, even23)));
  vst1q_f32(out + to, vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23)));
  vst1q_f32(out + 2 * to, vreinterpretq_f32_f64(vtrn2q_f64(even01, even23)));
  vst1q_f32(out + 3 * to, vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23)));
#else
  for (int i = 0; i < kVector; ++i) {
    for (int j = 0; j < kVector; ++j) out[j * to + i] = in[i * from + j];
  }
#endif
}

}  // namespace qlora::QLORA_ISA
