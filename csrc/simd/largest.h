// The largest of many numbers. The compiler leaves such a loop scalar, since a comparison with NaN has a side.
#pragma once

#include "simd/vector.h"

namespace qlora::QLORA_ISA {

/// The largest of n that are not NaN; -infinity where n is 0. `look` is called with each vector of them, the last
/// perhaps filled up with -infinity.
template <class Look>
QLORA_INLINE float largestOf(const float* x, int64_t n, Look&& look) {
  // Several chains, since one waits for each comparison in turn.
  constexpr int kChains = 4;
  Vector most[kChains];
  for (Vector& m : most) m = broadcast(-__builtin_inff());
  const auto take = [&](int chain, Vector v) {
    look(v);
    most[chain] = maximum(v, most[chain]);
  };
  int64_t i = 0;
  for (; i + kChains * kVector <= n; i += kChains * kVector) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) take(c, load(x + i + c * kVector));
  }
  for (; i + kVector <= n; i += kVector) take(0, load(x + i));
  if (i < n) {
    alignas(sizeof(Vector)) float rest[kVector];
    for (int l = 0; l < kVector; ++l) rest[l] = i + l < n ? x[i + l] : -__builtin_inff();
    take(0, load(rest));
  }
  const Vector all = maximum(maximum(most[0], most[1]), maximum(most[2], most[3]));
  float largest = all[0];
  for (int l = 1; l < kVector; ++l) largest = all[l] > largest ? all[l] : largest;
  return largest;
}

QLORA_INLINE float largestOf(const float* x, int64_t n) {
  return largestOf(x, n, [](Vector) {});
}

/// The same, but +infinity where any is NaN.
QLORA_INLINE float largestOrInfinity(const float* x, int64_t n) {
  IntVector isNaN{};
  const float largest = largestOf(x, n, [&](Vector v) { isNaN |= v != v; });
  for (int l = 0; l < kVector; ++l) {
    if (isNaN[l]) return __builtin_inff();
  }
  return largest;
}

}  // namespace qlora::QLORA_ISA
