// The vectors in which attention computes, and the functions of them that it needs.
#pragma once

#include "simd/vector.h"

namespace qlora::QLORA_ISA::attention {

constexpr int kWidth = kVector;
#if QLORA_NEON
constexpr int kRows = 10;  // of a tile of two vectors: 20 of 32 registers; with 24, gcc 12 keeps some sums in memory
#else
constexpr int kRows = kVector == 16 ? 12 : kVector == 8 ? 6 : 4;  // 24 of 32 registers, 12 of 16
#endif

using Vec = Vector;
using IntVec = IntVector;
using QLORA_ISA::load, QLORA_ISA::store, QLORA_ISA::multiplyAdd, QLORA_ISA::maximum;

QLORA_INLINE Vec splat(float x) { return broadcast(x); }
QLORA_INLINE IntVec splat(int32_t x) { return x - IntVec{}; }

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
