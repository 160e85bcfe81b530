// What happens to scores between the products: who sees whom, masks, soft cap.
//
// Scores are kept as S^T [keys, kPanel]: a row a key, lanes are queries, so that maxima and sums over keys need no
// shuffles.
#pragma once

#include <algorithm>

#include "ops/attention_product.h"
#if defined(QLORA_ISA_amx)
#include "ops/attention_tiles.h"
#endif

namespace qlora::QLORA_ISA::attention {

/// Calls f(math, zero) with the arithmetic for a dtype and a value of the C++ type behind it.
template <class F>
QLORA_INLINE void dispatchMath(DType dtype, F&& f) {
#if defined(QLORA_ISA_amx)
  if (dtype == DType::bf16) return f(TilePairs{}, bf16{});
#elif defined(QLORA_ISA_avx512bf16) || QLORA_ISA_neonbf16
  if (dtype == DType::bf16) return f(BFloat16Pairs{}, bf16{});
#endif
  dispatchFloat(dtype, [&](auto zero) { f(Float32{}, zero); });
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = __builtin_inff();

/// One batch row's rules of who sees whom. Positions are those of keys.
struct Visibility {
  int64_t Tq, keyLength;
  int causal;
  int64_t window;
  const int32_t* querySegments;  // null without
  const int32_t* keySegments;

  QLORA_INLINE int64_t position(int64_t query) const { return keyLength - Tq + query; }
};

/// How many keys batch row b has.
QLORA_INLINE int64_t keyLengthOf(const AttentionForward& a, int64_t b) {
  return a.pastLength.defined() ? a.pastLength.data<int32_t>()[b] + a.q.dim(1) : a.k.dim(1);
}

inline int64_t longestKeyLength(const AttentionForward& a) {
  int64_t longest = 0;
  for (int64_t b = 0; b < a.q.dim(0); ++b) longest = std::max(longest, keyLengthOf(a, b));
  return longest;
}

/// Of batch row b.
inline Visibility visibilityOf(const AttentionForward& a, int64_t b) {
  const int64_t Tq = a.q.dim(1), S = a.k.dim(1);
  return {Tq,
          keyLengthOf(a, b),
          a.causal,
          a.window,
          a.querySegments.defined() ? a.querySegments.data<int32_t>() + b * Tq : nullptr,
          a.keySegments.defined() ? a.keySegments.data<int32_t>() + b * S : nullptr};
}

/// Keys [begin, end) that queries of a panel may see; `partial` where not each of them sees each.
struct KeyRange {
  int64_t begin, end;
  bool partial;
};

/// Of the keys that queries [q0, q1) may see by position, those from `begin` to `end`.
QLORA_INLINE KeyRange visibleByPosition(const Visibility& rule, int64_t q0, int64_t q1, int64_t begin, int64_t end) {
  const int64_t first = rule.position(q0), last = rule.position(q1 - 1);
  KeyRange range{begin, end, false};
  if (rule.causal) range.end = std::min(end, last + 1);
  if (rule.window) range.begin = std::max(begin, first - rule.window + 1);
  range.partial = (rule.causal && range.end - 1 > first) || (rule.window && range.begin <= last - rule.window);
  return range;
}

/// The same with segment ids looked at: empty where the block has no segment in common.
inline KeyRange visibleKeys(const Visibility& rule, int64_t q0, int64_t q1, int64_t begin, int64_t end) {
  KeyRange range = visibleByPosition(rule, q0, q1, begin, end);
  if (!rule.querySegments || range.begin >= range.end) return range;
  int32_t lowQuery = rule.querySegments[q0], highQuery = lowQuery;
  for (int64_t i = q0; i < q1; ++i) {
    lowQuery = std::min(lowQuery, rule.querySegments[i]);
    highQuery = std::max(highQuery, rule.querySegments[i]);
  }
  int32_t lowKey = rule.keySegments[range.begin], highKey = lowKey;
  for (int64_t j = range.begin; j < range.end; ++j) {
    lowKey = std::min(lowKey, rule.keySegments[j]);
    highKey = std::max(highKey, rule.keySegments[j]);
  }
  if (highQuery < 0 || highKey < 0 || highQuery < lowKey || highKey < lowQuery) return {begin, begin, false};
  range.partial = range.partial || lowQuery < 0 || lowQuery != highQuery || lowKey != highKey || lowKey != lowQuery;
  return range;
}

/// Scores of keys [range.begin, range.end) and queries from q0: -infinity where unseen. `scores` is the row of
/// range.begin.
inline void maskScores(const Visibility& rule, const KeyRange& range, int64_t q0, float* scores) {
  int32_t lane[kWidth];
  for (int l = 0; l < kWidth; ++l) lane[l] = l;
  for (int v = 0; v < 2; ++v) {
    const IntVec position = load(lane) + splat(static_cast<int32_t>(rule.position(q0) + v * kWidth));
    const int64_t window = std::min<int64_t>(rule.window, INT32_MAX / 2);
    int32_t ids[kWidth];
    for (int l = 0; l < kWidth && rule.querySegments; ++l) {
      ids[l] = q0 + v * kWidth + l < rule.Tq ? rule.querySegments[q0 + v * kWidth + l] : -1;
    }
    for (int64_t j = range.begin; j < range.end; ++j) {
      const IntVec key = splat(static_cast<int32_t>(j));
      IntVec seen = splat(-1);
      if (rule.causal) seen &= position >= key;
      if (window) seen &= position - static_cast<int32_t>(window) < key;
      if (rule.querySegments) {
        seen &= load(ids) == splat(rule.keySegments[j]);
        if (rule.keySegments[j] < 0) seen = IntVec{};
      }
      float* row = scores + (j - range.begin) * kPanel + v * kWidth;
      store(row, seen ? load(row) : splat(-kInfinity));
    }
  }
}

/// Of `count` raw scores x: softCap * tanh(x * scale / softCap), in units of log2.
inline void capScores(float scale, float softCap, int64_t count, float* scores) {
  const float inner = scale / softCap, outer = softCap * kLog2E;
  for (int64_t i = 0; i < count; i += kWidth) store(scores + i, outer * tanhOf(load(scores + i) * inner));
}

}  // namespace qlora::QLORA_ISA::attention
