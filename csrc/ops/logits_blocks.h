// Rows of logits on the CPU: their largest, and their tokens block by block.
#pragma once

#include "core/stream.h"
#include "ops/logits_rows.h"
#include "simd/lanes.h"
#include "simd/largest.h"

namespace qlora::QLORA_ISA {

/// The largest logit of each row [B]. NaN and +infinity come from a model that broke, and are refused; -infinity is a
/// token that was forbidden.
QLORA_INLINE const float* checkedLargest(Context& context, const char* op, const float* logits, int64_t B, int64_t V) {
  float* largest = context.scratch.take<float>(B);
  context.pool.parallelFor(B, [&](int64_t row, int) { largest[row] = largestOrInfinity(logits + row * V, V); });
  for (int64_t row = 0; row < B; ++row) {
    if (largest[row] == __builtin_inff()) failNotFinite(op, row);
  }
  return largest;
}

/// As above, and refuses a row of nothing but -infinity.
QLORA_INLINE const float* checkedLargestLeft(Context& context, const char* op, const float* logits, int64_t B,
                                             int64_t V) {
  const float* largest = checkedLargest(context, op, logits, B, V);
  for (int64_t row = 0; row < B; ++row) {
    if (largest[row] == -__builtin_inff()) failNoTokenLeft(op, row);
  }
  return largest;
}

/// Rows are gone over in such blocks, so that those of which nothing is left or wanted cost a comparison.
constexpr int64_t kLogitsBlock = 256;

/// Calls f(begin, n, largest) for each block of a row whose largest logit is at least `least`.
template <class F>
QLORA_INLINE void forBlocksFrom(float least, const float* z, int64_t V, F&& f) {
  for (int64_t begin = 0; begin < V; begin += kLogitsBlock) {
    const int64_t n = V - begin < kLogitsBlock ? V - begin : kLogitsBlock;
    const float largest = largestOf(z + begin, n);
    if (largest >= least) f(begin, n, largest);
  }
}

/// What is left: all but -infinity.
constexpr float kLeastLeft = -__FLT_MAX__;

/// e^(z - largest) of a block.
struct BlockWeights {
  float of[kLogitsBlock];

  QLORA_INLINE BlockWeights(const float* z, int64_t n, float largest) {
    for (int64_t i = 0; i < n; ++i) of[i] = fastExp(z[i] - largest);
  }
  /// In fp64, in kLanes partial sums.
  QLORA_INLINE double sum(int64_t n) const {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(of[i + l]);
    }
    for (; i < n; ++i) lanes[0] += static_cast<double>(of[i]);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

}  // namespace qlora::QLORA_ISA
