#include "ops/attention_decode.h"

#include <algorithm>
#include <cmath>

#include "ops/attention_scores.h"
#include "simd/lanes.h"

namespace qlora::QLORA_ISA::attention {

namespace {

// Keys a task, whose sums are kept apart and added in order; and keys converted to fp32 at a time.
constexpr int64_t kSplitKeys = 512;
constexpr int64_t kBlockKeys = 32;

QLORA_INLINE bool sees(const Visibility& rule, int64_t query, int64_t key) {
  if (rule.causal && key > rule.position(query)) return false;
  if (rule.window && key <= rule.position(query) - rule.window) return false;
  return !rule.querySegments || (rule.querySegments[query] >= 0 && rule.querySegments[query] == rule.keySegments[key]);
}

}  // namespace

void decode(Context& context, const AttentionForward& a) {
  const int64_t B = a.q.dim(0), Tq = a.q.dim(1), H = a.q.dim(2), D = a.q.dim(3), S = a.k.dim(1), Hkv = a.k.dim(2);
  const int64_t group = H / Hkv, rows = group * Tq, splits = std::max<int64_t>(1, divideUp(a.keyLength, kSplitKeys));
  // A row of queries is (query, head of the group); a split leaves of each the sum of out, of weights, and the maximum.
  const int64_t stride = D + 2;
  float* partial = context.scratch.take<float>(B * Hkv * splits * rows * stride);
  float* blocks = context.scratch.take<float>(context.pool.size() * (kBlockKeys + rows) * D);
  float* weights = context.scratch.take<float>(context.pool.size() * rows * kSplitKeys);
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* q = a.q.data<T>();
    const T* k = a.k.data<T>();
    const T* v = a.v.data<T>();
    T* out = a.out.data<T>();
    context.pool.parallelFor(B * Hkv * splits, [&](int64_t task, int thread) {
      const int64_t split = task % splits, kvHead = task / splits % Hkv, b = task / splits / Hkv;
      const Visibility rule{Tq,
                            a.keyLength,
                            a.causal,
                            a.window,
                            a.querySegments.defined() ? a.querySegments.data<int32_t>() + b * Tq : nullptr,
                            a.keySegments.defined() ? a.keySegments.data<int32_t>() + b * S : nullptr};
      const int64_t splitEnd = std::min(a.keyLength, (split + 1) * kSplitKeys);
      const KeyRange range = visibleByPosition(rule, 0, Tq, split * kSplitKeys, splitEnd);
      float* block = blocks + thread * (kBlockKeys + rows) * D;
      float* queries = block + kBlockKeys * D;
      float* weight = weights + thread * rows * kSplitKeys;
      float* sums = partial + task * rows * stride;
      std::fill(sums, sums + rows * stride, 0.0f);
      const auto convert = [&](const T* from, int64_t j0, int64_t n) {
        for (int64_t j = 0; j < n; ++j) {
          const T* row = from + ((b * S + j0 + j) * Hkv + kvHead) * D;
          for (int64_t d = 0; d < D; ++d) block[j * D + d] = toFloat(row[d]);
        }
      };
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = q + ((b * Tq + r / group) * H + kvHead * group + r % group) * D;
        for (int64_t d = 0; d < D; ++d) queries[r * D + d] = toFloat(row[d]) * a.scale;
      }

      for (int64_t j0 = range.begin; j0 < range.end; j0 += kBlockKeys) {
        const int64_t n = std::min(kBlockKeys, range.end - j0);
        convert(k, j0, n);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < n; ++j) {
            const float* x = queries + r * D;
            const float* y = block + j * D;
            float s = laneSum(D, [&](int64_t d) { return x[d] * y[d]; });
            if (a.softCap > 0) s = a.softCap * std::tanh(s / a.softCap);
            weight[r * kSplitKeys + j0 - range.begin + j] = sees(rule, r / group, j0 + j) ? s : -kInfinity;
          }
        }
      }
      const int64_t count = std::max<int64_t>(0, range.end - range.begin);
      for (int64_t r = 0; r < rows; ++r) {
        float* w = weight + r * kSplitKeys;
        const float largest = laneMax(count, [&](int64_t j) { return w[j]; });
        const float base = largest == -kInfinity ? 0.0f : largest;
        for (int64_t j = 0; j < count; ++j) w[j] = fastExp(w[j] - base);
        sums[r * stride + D] = laneSum(count, [&](int64_t j) { return w[j]; });
        sums[r * stride + D + 1] = largest;
      }
      for (int64_t j0 = range.begin; j0 < range.end; j0 += kBlockKeys) {
        const int64_t n = std::min(kBlockKeys, range.end - j0);
        convert(v, j0, n);
        for (int64_t r = 0; r < rows; ++r) {
          float* __restrict sum = sums + r * stride;
          for (int64_t j = 0; j < n; ++j) {
            const float w = weight[r * kSplitKeys + j0 - range.begin + j];
            for (int64_t d = 0; d < D; ++d) sum[d] += w * block[j * D + d];
          }
        }
      }
    });

    context.pool.parallelFor(B * Hkv, [&](int64_t task, int) {
      const int64_t kvHead = task % Hkv, b = task / Hkv;
      for (int64_t r = 0; r < rows; ++r) {
        float* first = partial + (task * splits * rows + r) * stride;
        const auto at = [&](int64_t split) { return first + split * rows * stride; };
        float largest = -kInfinity, total = 0;
        for (int64_t s = 0; s < splits; ++s) largest = std::max(largest, at(s)[D + 1]);
        const float base = largest == -kInfinity ? 0.0f : largest;
        for (int64_t s = 0; s < splits; ++s) {
          float* sum = at(s);
          const float factor = fastExp(sum[D + 1] - base);
          total += sum[D] * factor;
          for (int64_t d = 0; d < D; ++d) first[d] = (s ? first[d] : 0.0f) + sum[d] * factor;
        }
        const int64_t head = kvHead * group + r % group, query = r / group;
        const float inverse = total == 0 ? 0.0f : 1.0f / total;
        a.logSumExp.data<float>()[(b * H + head) * Tq + query] = total == 0 ? -kInfinity : largest + std::log(total);
        T* to = out + ((b * Tq + query) * H + head) * D;
        for (int64_t d = 0; d < D; ++d) to[d] = fromFloat<T>(first[d] * inverse);
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA::attention
