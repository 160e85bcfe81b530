#include "ops/attention_decode.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ops/attention_scores.h"

namespace qlora::QLORA_ISA::attention {

namespace {

// Keys a task, whose sums are kept apart and added in order.
constexpr int64_t kSplitKeys = 512;
// Memory is asked for a key so many keys ahead, and for its value with it at hand: those are read when all keys of the
// split have scores. The rows of a head lie apart, which a processor does not foresee.
constexpr int64_t kAheadKeys = 128;

constexpr std::make_integer_sequence<int, kWidth> kLanes;

/// One level of a transposing sum: of blocks of `step` lanes, a's and b's neighbours are added and take turns.
template <int step, int... l>
QLORA_INLINE Vec addNeighbours(Vec a, Vec b, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, ((l & step) == 0 ? l : kWidth + l - step)...) +
         __builtin_shufflevector(a, b, ((l & step) == 0 ? l + step : kWidth + l)...);
}

/// Lane l of the result is the sum over the lanes of x[l].
template <int step = 1>
QLORA_INLINE Vec sumsOf(Vec* x) {
  if constexpr (step == kWidth) {
    return x[0];
  } else {
    for (int i = 0; i < kWidth / step / 2; ++i) x[i] = addNeighbours<step>(x[2 * i], x[2 * i + 1], kLanes);
    return sumsOf<step * 2>(x);
  }
}

/// Dot products of one query with kWidth keys; rows of `depth` elements, a multiple of kWidth.
template <class Math>
QLORA_INLINE Vec dots(const typename Math::Element* query, const typename Math::Element* keys, int64_t depth) {
  Vec sum[kWidth] = {};
  for (int64_t k = 0; k < depth; k += kWidth) {
    const typename Math::Lanes x = Math::lanes(query + k);
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) sum[j] = Math::multiplyAdd(x, Math::lanes(keys + j * depth + k), sum[j]);
  }
  return sumsOf(sum);
}

/// One row [D] as elements, zero up to `depth` of them.
template <class Math, class T>
QLORA_INLINE void packRow(const T* x, int64_t D, int64_t depth, typename Math::Element* to) {
  const int64_t whole = D / Math::kPack;
  for (int64_t k = 0; k < whole; ++k) to[k] = Math::element(x[k * Math::kPack], x[(k + 1) * Math::kPack - 1]);
  for (int64_t k = whole; k < depth; ++k) {
    to[k] = k * Math::kPack < D ? Math::element(x[k * Math::kPack], T{}) : typename Math::Element{};
  }
}

/// Into the second cache.
template <class T>
QLORA_INLINE void prefetchRow(const T* row, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(row + d, 0, 2);
}

QLORA_INLINE bool sees(const Visibility& rule, int64_t query, int64_t key) {
  if (rule.causal && key > rule.position(query)) return false;
  if (rule.window && key <= rule.position(query) - rule.window) return false;
  return !rule.querySegments || (rule.querySegments[query] >= 0 && rule.querySegments[query] == rule.keySegments[key]);
}

/// What one thread works in.
template <class Math>
struct DecodeScratch {
  typename Math::Element *queries, *keys, *values, *weights;
  float* scores;

  DecodeScratch(Scratch& scratch, int64_t rows, int64_t depth, int64_t paddedD) {
    queries = scratch.take<typename Math::Element>(rows * depth);
    keys = scratch.take<typename Math::Element>(kWidth * depth);
    values = scratch.take<typename Math::Element>(kKeys / Math::kPack * paddedD);
    weights = scratch.take<typename Math::Element>(rows * kSplitKeys / Math::kPack);
    scores = scratch.take<float>(rows * kSplitKeys);
  }
};

/// Scores of a row become weights exp2(x - maximum), as elements along the keys. Returns their sum.
template <class Math>
float softmax(int64_t keys, float multiplier, const float* scores, typename Math::Element* weights, int64_t chunkStride,
              float& maximum) {
  Vec largest = splat(-kInfinity);
  for (int64_t j = 0; j < keys; j += kWidth) largest = attention::maximum(largest, load(scores + j));
  maximum = -kInfinity;
  for (int l = 0; l < kWidth; ++l) maximum = std::max(maximum, largest[l]);
  maximum *= multiplier;
  const float base = maximum == -kInfinity ? 0.0f : -maximum;
  Vec total = {};
  for (int64_t j = 0; j < keys; j += kPanel) {
    Vec p[2];
    for (int v = 0; v < 2; ++v) {
      p[v] = exp2Of(multiplyAdd(load(scores + j + v * kWidth), splat(multiplier), splat(base)));
      total += p[v];
    }
    if constexpr (Math::kPack == 1) {
      for (int v = 0; v < 2; ++v) {
        const int64_t k = j + v * kWidth;
        store(weights + k / kChunk * chunkStride + k % kChunk, p[v]);
      }
    } else {
      const int64_t k = j / Math::kPack;
      Math::storeAlongLanes(weights + k / kChunk * chunkStride + k % kChunk, p[0], p[1]);
    }
  }
  float sum = 0;
  for (int l = 0; l < kWidth; ++l) sum += total[l];
  return sum;
}

template <class Math, class T>
void decodeWith(Context& context, const AttentionForward& a) {
  using Element = typename Math::Element;
  const int64_t B = a.q.dim(0), Tq = a.q.dim(1), H = a.q.dim(2), D = a.q.dim(3), S = a.k.dim(1), Hkv = a.k.dim(2);
  const int64_t group = H / Hkv, rows = group * Tq,
                splits = std::max<int64_t>(1, divideUp(longestKeyLength(a), kSplitKeys));
  const int64_t depth = roundUp(divideUp(D, Math::kPack), kWidth), paddedD = roundUp(D, kPanel);
  // A row is (query, head of the group). Of each a split leaves the sums of out and of weights, and the maximum.
  const int64_t stride = paddedD + kWidth;
  float* partial = context.scratch.take<float>(B * Hkv * splits * rows * stride);
  DecodeScratch<Math>* threads = context.scratch.take<DecodeScratch<Math>>(context.pool.size());
  for (int i = 0; i < context.pool.size(); ++i) threads[i] = DecodeScratch<Math>(context.scratch, rows, depth, paddedD);
  const float multiplier = a.softCap > 0 ? 1.0f : a.scale * kLog2E;

  context.pool.parallelFor(B * Hkv * splits, [&](int64_t task, int thread) {
    [[maybe_unused]] const typename Math::Session session;
    const DecodeScratch<Math>& my = threads[thread];
    const int64_t split = task % splits, kvHead = task / splits % Hkv, b = task / splits / Hkv;
    const Visibility rule = visibilityOf(a, b);
    const KeyRange range =
        visibleByPosition(rule, 0, Tq, split * kSplitKeys, std::min(rule.keyLength, (split + 1) * kSplitKeys));
    const int64_t count = std::max<int64_t>(0, range.end - range.begin), padded = roundUp(count, kPanel);
    const int64_t first = ((b * S + range.begin) * Hkv + kvHead) * D;
    float* sums = partial + task * rows * stride;
    std::fill(sums, sums + rows * stride, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      packRow<Math>(a.q.data<T>() + ((b * Tq + r / group) * H + kvHead * group + r % group) * D, D, depth,
                    my.queries + r * depth);
    }
    for (int64_t j0 = 0; j0 < count; j0 += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, count - j0);
      for (int64_t j = 0; j < n; ++j) {
        const T* row = a.k.data<T>() + first + (j0 + j) * Hkv * D;
        if (range.begin + j0 + j + kAheadKeys < rule.keyLength) prefetchRow(row + kAheadKeys * Hkv * D, D);
        prefetchRow(a.v.data<T>() + first + (j0 + j) * Hkv * D, D);
        packRow<Math>(row, D, depth, my.keys + j * depth);
      }
      for (int64_t r = 0; r < rows; ++r) {
        store(my.scores + r * kSplitKeys + j0, dots<Math>(my.queries + r * depth, my.keys, depth));
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = my.scores + r * kSplitKeys;
      if (a.softCap > 0) capScores(a.scale, a.softCap, padded, scores);
      std::fill(scores + count, scores + padded, -kInfinity);
      for (int64_t j = 0; j < count && (range.partial || rule.querySegments); ++j) {
        if (!sees(rule, r / group, range.begin + j)) scores[j] = -kInfinity;
      }
      sums[r * stride + paddedD] = softmax<Math>(padded, multiplier, scores, my.weights + r * kChunk, rows * kChunk,
                                                 sums[r * stride + paddedD + 1]);
    }
    for (int64_t j0 = 0; j0 < count; j0 += kKeys) {
      const int64_t n = std::min<int64_t>(kKeys, count - j0);
      packLanesOfColumns<Math>(a.v.data<T>() + first + j0 * Hkv * D, Hkv * D, n, D, kKeys, my.values);
      for (int64_t d = 0; d < D; d += kPanel) {
        multiply<Math>(rows, std::min<int64_t>(kPanel, D - d),
                       AlongRow<Element>{my.weights + j0 / Math::kPack * rows, rows * kChunk},
                       my.values + d * kKeys / Math::kPack, divideUp(n, Math::kPack), sums + d, stride, Sum::add);
      }
    }
  });

  context.pool.parallelFor(B * Hkv, [&](int64_t task, int) {
    const int64_t kvHead = task % Hkv, b = task / Hkv;
    for (int64_t r = 0; r < rows; ++r) {
      float* out = partial + (task * splits * rows + r) * stride;
      const int64_t splitStride = rows * stride;
      float maximum = -kInfinity, total = 0;
      for (int64_t s = 0; s < splits; ++s) maximum = std::max(maximum, out[s * splitStride + paddedD + 1]);
      const float base = maximum == -kInfinity ? 0.0f : maximum;
      for (int64_t s = 0; s < splits; ++s) {
        const float* sums = out + s * splitStride;
        const float factor = exp2f(sums[paddedD + 1] - base);
        total += sums[paddedD] * factor;
        for (int64_t d = 0; d < D; ++d) out[d] = (s ? out[d] : 0.0f) + sums[d] * factor;
      }
      const int64_t head = kvHead * group + r % group, query = r / group;
      const float inverse = total == 0 ? 0.0f : 1.0f / total;
      a.logSumExp.data<float>()[(b * H + head) * Tq + query] =
          total == 0 ? -kInfinity : maximum * kLn2 + std::log(total);
      T* to = a.out.data<T>() + ((b * Tq + query) * H + head) * D;
      for (int64_t d = 0; d < D; ++d) to[d] = fromFloat<T>(out[d] * inverse);
    }
  });
}

}  // namespace

void decode(Context& context, const AttentionForward& a) {
  dispatchMath(a.q.dtype, [&](auto math, auto zero) { decodeWith<decltype(math), decltype(zero)>(context, a); });
}

}  // namespace qlora::QLORA_ISA::attention
