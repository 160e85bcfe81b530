// A tile of fp32 sums on NEON. Its 32 registers hold 12 rows of two vectors beside what is multiplied.
//
// Two steps of k at a time: a broadcast would take the pipes that multiply (ld1r and dup run there on most cores),
// while fmla takes a lane of a register that an ordinary load of two neighbours filled: 16 loads for 48 multiply-adds.
#pragma once

#include "simd/vector.h"

namespace qlora::QLORA_ISA {

/// sum[r][v] += rows[r * kStride + k] * strip[k][v * kVector ...] over k < depth.
template <int R, int kStride>
QLORA_INLINE void multiplyTile(int64_t depth, const float* rows, const float* strip, Vector (&sum)[R][2]) {
  constexpr int kStrip = 2 * kVector;
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, strip += 2 * kStrip) {
    const Vector low0 = load(strip), high0 = load(strip + kVector);
    const Vector low1 = load(strip + kStrip), high1 = load(strip + kStrip + kVector);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float32x2_t x = vld1_f32(rows + r * kStride + k);
      float32x4_t low = sum[r][0], high = sum[r][1];
      // The two keep one row behind the other: gcc 12 would begin with all loads, and have no registers left for sums.
      asm volatile("" : "+w"(x));
      low = vfmaq_lane_f32(low, low0, x, 0);
      high = vfmaq_lane_f32(high, high0, x, 0);
      low = vfmaq_lane_f32(low, low1, x, 1);
      high = vfmaq_lane_f32(high, high1, x, 1);
      asm volatile("" : "+w"(low), "+w"(high));
      sum[r][0] = low;
      sum[r][1] = high;
    }
  }
  if (k == depth) return;
  const Vector low = load(strip), high = load(strip + kVector);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const float x = rows[r * kStride + k];
    sum[r][0] = vfmaq_n_f32(sum[r][0], low, x);
    sum[r][1] = vfmaq_n_f32(sum[r][1], high, x);
  }
}

}  // namespace qlora::QLORA_ISA
