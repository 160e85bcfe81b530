// The vectors in which attention computes: as wide as the instruction set has them, with the few functions that the
// compiler's own vector types lack.
#pragma once

#include <cstdint>

#include "core/dtype.h"

#if defined(QLORA_ISA_avx2) || defined(QLORA_ISA_avx512) || defined(QLORA_ISA_avx512bf16)
// gcc 12 warns of the registers that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif QLORA_NEON
#include <arm_neon.h>
#endif

namespace qlora::QLORA_ISA::attention {

#if defined(QLORA_ISA_avx512) || defined(QLORA_ISA_avx512bf16)
constexpr int kWidth = 16;
constexpr int kRows = 12;  // of a tile of two vectors: 24 of 32 registers
#elif defined(QLORA_ISA_avx2)
constexpr int kWidth = 8;
constexpr int kRows = 6;  // 12 of 16 registers
#elif QLORA_NEON
constexpr int kWidth = 4;
constexpr int kRows = 10;  // 20 of 32 registers: with 24, gcc 12 keeps some sums in memory
#else
constexpr int kWidth = 4;
constexpr int kRows = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedVec __attribute__((vector_size(4 * kWidth), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef int32_t UnalignedIntVec __attribute__((vector_size(4 * kWidth), aligned(4)));

QLORA_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
QLORA_INLINE IntVec load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
QLORA_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
QLORA_INLINE Vec splat(float x) { return x - Vec{}; }
QLORA_INLINE IntVec splat(int32_t x) { return x - IntVec{}; }

QLORA_INLINE Vec multiplyAdd(Vec a, Vec b, Vec c) {
#if defined(QLORA_ISA_avx512) || defined(QLORA_ISA_avx512bf16)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(QLORA_ISA_avx2)
  return _mm256_fmadd_ps(a, b, c);
#elif QLORA_NEON
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

/// b where either is NaN.
QLORA_INLINE Vec maximum(Vec a, Vec b) {
#if defined(QLORA_ISA_avx512) || defined(QLORA_ISA_avx512bf16)
  return _mm512_max_ps(a, b);
#elif defined(QLORA_ISA_avx2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

/// 2^x to within 2 units in the last place for x <= 127; 0 below about -126, NaN stays. x is split into n + r, |r| <=
/// 1/2; 2^r is a polynomial (coefficients: least largest relative error on that interval, 9.2e-8).
QLORA_INLINE Vec exp2Of(Vec x) {
  const Vec clamped = maximum(splat(-200.0f), x);
#if defined(QLORA_ISA_avx512) || defined(QLORA_ISA_avx512bf16)
  const Vec n = _mm512_roundscale_ps(clamped, 8);
#else
  const Vec n = (clamped + 0x1.8p23f) - 0x1.8p23f;
#endif
  const Vec r = clamped - n;
  Vec p = multiplyAdd(splat(1.326472021e-03f), r, splat(9.671513139e-03f));
  p = multiplyAdd(p, r, splat(5.550733766e-02f));
  p = multiplyAdd(p, r, splat(2.402224207e-01f));
  p = multiplyAdd(p, r, splat(6.931469776e-01f));
  p = multiplyAdd(p, r, splat(1.0f));
#if defined(QLORA_ISA_avx512) || defined(QLORA_ISA_avx512bf16)
  return _mm512_scalef_ps(p, n);
#else
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  const Vec y = p * (Vec)exponent;
  return clamped < -126.0f ? Vec{} : y;
#endif
}

/// tanh(x): an odd polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere.
QLORA_INLINE Vec tanhOf(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec limited = magnitude > 10.0f ? splat(10.0f) : magnitude;
  const Vec large = 1.0f - 2.0f / (exp2Of(limited * 2.885390082f) + 1.0f);
  const Vec square = limited * limited;
  Vec p = multiplyAdd(splat(-8.863235530e-3f), square, splat(2.186948854e-2f));
  p = multiplyAdd(p, square, splat(-5.396825397e-2f));
  p = multiplyAdd(p, square, splat(1.333333333e-1f));
  p = multiplyAdd(p, square, splat(-3.333333333e-1f));
  const Vec small = multiplyAdd(p * square, limited, limited);
  const Vec y = limited < 0.3f ? small : large;
  return x < 0.0f ? -y : y;
}

}  // namespace qlora::QLORA_ISA::attention
