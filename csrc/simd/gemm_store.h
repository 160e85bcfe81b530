// The end of every matmul: sums become elements of C.
#pragma once

#include "simd/gemm.h"

namespace qlora::QLORA_ISA {

/// Most elements that storeRow takes at a time.
constexpr int kStoreMost = 128;

/// C[m, n .. n + count) from fp32 sums.
QLORA_INLINE void storeRow(const Gemm& g, int64_t m, int64_t n, int64_t count, const float* sums) {
  const float scale = g.rowScale ? g.alpha * g.rowScale[m] : g.alpha;
  float line[kStoreMost];
  for (int64_t i = 0; i < count; ++i) line[i] = sums[i] * scale;
  if (g.columnScale) {
    for (int64_t i = 0; i < count; ++i) line[i] *= g.columnScale[n + i];
  }
  if (g.bias) {
    for (int64_t i = 0; i < count; ++i) line[i] += g.bias[n + i];
  }
  dispatchFloat(g.cDtype, [&](auto zero) {
    using T = decltype(zero);
    T* c = static_cast<T*>(g.c) + m * g.cStride + n;
    if (g.store == GemmStore::add) {
      for (int64_t i = 0; i < count; ++i) line[i] += toFloat(c[i]);
    }
    for (int64_t i = 0; i < count; ++i) c[i] = fromFloat<T>(line[i]);
  });
}

}  // namespace qlora::QLORA_ISA
