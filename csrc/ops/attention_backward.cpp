#include <algorithm>
#include <cmath>

#include "ops/attention.h"
#include "ops/attention_scores.h"
#include "simd/lanes.h"

namespace qlora::QLORA_ISA {

namespace attention {

namespace {

// A pair (batch row, key head) is split into parts with sums of their own for dk and dv, until there are so many tasks.
// The number depends on shapes alone, and the parts are added in order.
constexpr int64_t kTasks = 16;

// The sums over queries below start at a whole chunk.
template <class Math>
constexpr int64_t kPanelsPerChunk = std::max(1, kChunk* Math::kPack / kPanel);

/// Sizes, in elements, of packed blocks.
template <class Math>
struct Layout {
  int64_t D, depth, paddedD, alongRow, ofColumns;

  explicit Layout(int64_t D)
      : D(D),
        depth(divideUp(D, Math::kPack)),
        paddedD(roundUp(D, kPanel)),
        alongRow(roundUp(depth, kChunk) * kKeys),
        ofColumns(paddedD * kKeys / Math::kPack) {}
};

/// What one thread works in: a block of queries and its scores against a block of keys.
template <class Math>
struct BackwardScratch {
  using Element = typename Math::Element;

  Element *queries, *douts;             // vectors of queries
  Element *queryColumns, *doutColumns;  // vectors along D
  Element *weights, *dscores;           // p and ds [queries / kPack / 16][kKeys][16]
  Element* dscoreColumns;               // ds [kPanels][kKeys / kPack][kPanel]
  float *scores, *dweights;             // [kKeys][kPanel]
  float *dq, *logSumExp, *delta;

  BackwardScratch(Scratch& scratch, const Layout<Math>& layout) {
    queries = scratch.take<Element>(kQueries * layout.depth);
    douts = scratch.take<Element>(kQueries * layout.depth);
    queryColumns = scratch.take<Element>(kQueries / Math::kPack * layout.paddedD);
    doutColumns = scratch.take<Element>(kQueries / Math::kPack * layout.paddedD);
    weights = scratch.take<Element>(kQueries / Math::kPack * kKeys);
    dscores = scratch.take<Element>(kQueries / Math::kPack * kKeys);
    dscoreColumns = scratch.take<Element>(kQueries * kKeys / Math::kPack);
    scores = scratch.take<float>(kKeys * kPanel);
    dweights = scratch.take<float>(kKeys * kPanel);
    dq = scratch.take<float>(kQueries * layout.paddedD);
    logSumExp = scratch.take<float>(kQueries);
    delta = scratch.take<float>(kQueries);
  }
};

/// p and ds of a panel from its raw scores and dweights = dout v^T, for keys [begin, begin + keys) of the block.
template <class Math>
void differentiate(int64_t panel, int64_t begin, int64_t keys, float multiplier, float softCap,
                   const BackwardScratch<Math>& my) {
  constexpr int kPack = Math::kPack;
  const float inverseCap = softCap > 0 ? 1.0f / (softCap * kLog2E) : 0.0f;
  Vec base[2], delta[2];
  for (int v = 0; v < 2; ++v) {
    base[v] = -load(my.logSumExp + panel * kPanel + v * kWidth);
    delta[v] = load(my.delta + panel * kPanel + v * kWidth);
  }
  const int64_t element = panel * kPanel / kPack;
  const int64_t along = element / kChunk * kKeys * kChunk + element % kChunk;
  for (int64_t g = 0; g < keys; g += kPack) {
    Vec ds[2][kPack];
    for (int i = 0; i < kPack; ++i) {
      const int64_t j = g + i;
      Vec p[2];
      for (int v = 0; v < 2; ++v) {
        if (j >= keys) {
          ds[v][i] = Vec{};
          continue;
        }
        const Vec x = load(my.scores + j * kPanel + v * kWidth);
        p[v] = exp2Of(multiplyAdd(x, splat(multiplier), base[v]));
        ds[v][i] = p[v] * (load(my.dweights + j * kPanel + v * kWidth) - delta[v]);
        if (softCap > 0) {
          const Vec t = attention::maximum(x * inverseCap, splat(-1.0f));
          ds[v][i] *= 1.0f - t * t;
        }
      }
      if (j >= keys) continue;
      const int64_t to = along + (begin + j) * kChunk;
      // In fp32 a panel of vectors as wide as a chunk takes two of them.
      constexpr int64_t kSecond = kPack == 1 && kWidth == kChunk ? kKeys * kChunk : kWidth;
      if constexpr (kPack == 1) {
        store(my.weights + to, p[0]);
        store(my.weights + to + kSecond, p[1]);
        store(my.dscores + to, ds[0][i]);
        store(my.dscores + to + kSecond, ds[1][i]);
      } else {
        Math::storeAlongLanes(my.weights + to, p[0], p[1]);
        Math::storeAlongLanes(my.dscores + to, ds[0][i], ds[1][i]);
      }
    }
    for (int v = 0; v < 2; ++v) {
      Math::storeAlongRows(my.dscoreColumns + (panel * kKeys + begin + g) / kPack * kPanel + v * kWidth, ds[v]);
    }
  }
}

/// Zeros p and ds of a panel for keys [begin, end) of the block.
template <class Math>
void clear(int64_t panel, int64_t begin, int64_t end, const BackwardScratch<Math>& my) {
  using Element = typename Math::Element;
  for (int64_t e = panel * kPanel / Math::kPack; e < (panel + 1) * kPanel / Math::kPack; ++e) {
    Element* weights = my.weights + e / kChunk * kKeys * kChunk + e % kChunk;
    Element* dscores = my.dscores + e / kChunk * kKeys * kChunk + e % kChunk;
    for (int64_t j = begin; j < end; ++j) weights[j * kChunk] = dscores[j * kChunk] = Element{};
  }
}

/// Keys and values of one block and where their gradients are summed.
template <class Math>
struct KeyBlock {
  const typename Math::Element *keys, *keyColumns, *values;
  float *dk, *dv;
  int64_t j0, j1;
};

template <class Math>
void backwardBlock(const AttentionBackward& a, const Layout<Math>& layout, const Visibility& rule, int64_t q0,
                   int64_t q1, const KeyBlock<Math>& block, const BackwardScratch<Math>& my) {
  using Element = typename Math::Element;
  const float multiplier = a.softCap > 0 ? 1.0f : a.scale * kLog2E;
  const int64_t keys = block.j1 - block.j0;
  int64_t firstPanel = kPanels, lastPanel = -1;  // that see any key of the block
  KeyRange ranges[kPanels];
  for (int64_t panel = 0; q0 + panel * kPanel < q1; ++panel) {
    const int64_t p0 = q0 + panel * kPanel, p1 = std::min<int64_t>(q1, p0 + kPanel);
    KeyRange& range = ranges[panel];
    range = visibleKeys(rule, p0, p1, block.j0, block.j1);
    if (range.begin >= range.end) {
      range = {block.j0, block.j0, false};
      continue;
    }
    if ((range.begin - block.j0) % Math::kPack) range = {range.begin - 1, range.end, true};
    firstPanel = std::min(firstPanel, panel);
    lastPanel = panel;
    const int64_t offset = range.begin - block.j0, n = range.end - range.begin;
    multiply<Math>(n, kPanel, AlongRow<Element>{block.keys + offset * kChunk, kKeys * kChunk},
                   my.queries + panel * kPanel * layout.depth, layout.depth, my.scores, kPanel, Sum::overwrite);
    multiply<Math>(n, kPanel, AlongRow<Element>{block.values + offset * kChunk, kKeys * kChunk},
                   my.douts + panel * kPanel * layout.depth, layout.depth, my.dweights, kPanel, Sum::overwrite);
    if (a.softCap > 0) capScores(a.scale, a.softCap, n * kPanel, my.scores);
    if (range.partial) maskScores(rule, range, p0, my.scores);
    differentiate<Math>(panel, offset, n, multiplier, a.softCap, my);
    for (int64_t d = 0; d < layout.D; d += kPanel) {
      multiply<Math>(p1 - p0, std::min<int64_t>(kPanel, layout.D - d),
                     AlongColumn<Element>{my.dscoreColumns + (panel * kKeys + offset) / Math::kPack * kPanel},
                     block.keyColumns + (d * kKeys + offset * kPanel) / Math::kPack, divideUp(n, Math::kPack),
                     my.dq + panel * kPanel * layout.paddedD + d, layout.paddedD, Sum::add);
    }
  }
  if (lastPanel < 0) return;
  firstPanel -= firstPanel % kPanelsPerChunk<Math>;
  int64_t first = block.j1, last = block.j0;
  for (int64_t panel = firstPanel; panel <= lastPanel; ++panel) {
    const KeyRange& range = ranges[panel];
    clear<Math>(panel, 0, range.begin - block.j0, my);
    clear<Math>(panel, range.end - block.j0, keys, my);
    if (range.begin < range.end) {
      first = std::min(first, range.begin);
      last = std::max(last, range.end);
    }
  }
  const int64_t k0 = firstPanel * kPanel / Math::kPack, K = (lastPanel + 1) * kPanel / Math::kPack - k0;
  const int64_t offset = first - block.j0, chunkStride = kKeys * kChunk;
  const int64_t at = k0 / kChunk * chunkStride + offset * kChunk;
  for (int64_t d = 0; d < layout.D; d += kPanel) {
    const int64_t lanes = std::min<int64_t>(kPanel, layout.D - d), column = d * kQueries / Math::kPack + k0 * kPanel;
    multiply<Math>(last - first, lanes, AlongRow<Element>{my.weights + at, chunkStride}, my.doutColumns + column, K,
                   block.dv + offset * layout.paddedD + d, layout.paddedD, Sum::add);
    multiply<Math>(last - first, lanes, AlongRow<Element>{my.dscores + at, chunkStride}, my.queryColumns + column, K,
                   block.dk + offset * layout.paddedD + d, layout.paddedD, Sum::add);
  }
}

template <class Math, class T>
void backward(Context& context, const AttentionBackward& a) {
  using Element = typename Math::Element;
  const int64_t B = a.q.dim(0), Tq = a.q.dim(1), H = a.q.dim(2), D = a.q.dim(3), S = a.k.dim(1), Hkv = a.k.dim(2);
  const Layout<Math> layout(D);
  const int64_t group = H / Hkv, keyBlocks = divideUp(S, kKeys), units = group * divideUp(Tq, kQueries);
  const int64_t pairs = B * Hkv;
  if (pairs == 0) return;
  const int64_t parts = std::max<int64_t>(1, std::min(units, pairs * 2 >= kTasks ? 1 : kTasks / pairs));

  Element* keys = context.scratch.take<Element>(pairs * keyBlocks * layout.alongRow);
  Element* values = context.scratch.take<Element>(pairs * keyBlocks * layout.alongRow);
  Element* keyColumns = context.scratch.take<Element>(pairs * keyBlocks * layout.ofColumns);
  context.pool.parallelFor(pairs * keyBlocks, [&](int64_t task, int) {
    const int64_t head = task / keyBlocks % Hkv, b = task / keyBlocks / Hkv, j0 = task % keyBlocks * kKeys;
    const int64_t at = ((b * S + j0) * Hkv + head) * D, rows = std::min<int64_t>(kKeys, S - j0);
    packAlongRow<Math>(a.k.data<T>() + at, Hkv * D, rows, D, kKeys, keys + task * layout.alongRow);
    packAlongRow<Math>(a.v.data<T>() + at, Hkv * D, rows, D, kKeys, values + task * layout.alongRow);
    packLanesOfColumns<Math>(a.k.data<T>() + at, Hkv * D, rows, D, kKeys, keyColumns + task * layout.ofColumns);
  });

  const int threadCount = context.pool.size();
  BackwardScratch<Math>* threads = context.scratch.take<BackwardScratch<Math>>(threadCount);
  for (int i = 0; i < threadCount; ++i) threads[i] = BackwardScratch<Math>(context.scratch, layout);
  // Sums of dk and dv: of a thread where a pair is one task, else of a task.
  const int64_t sumSize = S * layout.paddedD;
  float* sums = context.scratch.take<float>((parts == 1 ? threadCount : pairs * parts) * 2 * sumSize);

  const auto storeKeyGradients = [&](int64_t pair, int64_t j0, int64_t j1, const float* first) {
    const int64_t head = pair % Hkv, b = pair / Hkv;
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t to = ((b * S + j) * Hkv + head) * D;
      for (int64_t d = 0; d < D; ++d) {
        float dk = 0, dv = 0;
        for (int64_t part = 0; part < parts; ++part) {
          dk += first[part * 2 * sumSize + j * layout.paddedD + d];
          dv += first[(part * 2 + 1) * sumSize + j * layout.paddedD + d];
        }
        a.dk.data<T>()[to + d] = fromFloat<T>(dk * a.scale);
        a.dv.data<T>()[to + d] = fromFloat<T>(dv);
      }
    }
  };

  context.pool.parallelFor(pairs * parts, [&](int64_t task, int thread) {
    [[maybe_unused]] const typename Math::Session session;
    const BackwardScratch<Math>& my = threads[thread];
    const int64_t part = task % parts, pair = task / parts, b = pair / Hkv, kvHead = pair % Hkv;
    float* dk = sums + (parts == 1 ? thread : task) * 2 * sumSize;
    float* dv = dk + sumSize;
    std::fill(dk, dk + 2 * sumSize, 0.0f);
    const Visibility rule{Tq,
                          S,
                          a.causal,
                          a.window,
                          a.querySegments.defined() ? a.querySegments.data<int32_t>() + b * Tq : nullptr,
                          a.keySegments.defined() ? a.keySegments.data<int32_t>() + b * S : nullptr};
    for (int64_t unit = part; unit < units; unit += parts) {
      const int64_t head = kvHead * group + unit % group, q0 = unit / group * kQueries;
      const int64_t q1 = std::min(Tq, q0 + kQueries), at = ((b * Tq + q0) * H + head) * D;
      const T* dout = a.dout.data<T>() + at;
      packLanesOfRows<Math>(a.q.data<T>() + at, H * D, q1 - q0, D, my.queries);
      packLanesOfRows<Math>(dout, H * D, q1 - q0, D, my.douts);
      // Queries beyond the last have p = ds = 0, which must not meet garbage.
      std::fill(my.queryColumns, my.queryColumns + kQueries / Math::kPack * layout.paddedD, Element{});
      std::fill(my.doutColumns, my.doutColumns + kQueries / Math::kPack * layout.paddedD, Element{});
      packLanesOfColumns<Math>(a.q.data<T>() + at, H * D, q1 - q0, D, kQueries, my.queryColumns);
      packLanesOfColumns<Math>(dout, H * D, q1 - q0, D, kQueries, my.doutColumns);
      std::fill(my.dq, my.dq + kQueries * layout.paddedD, 0.0f);
      for (int64_t i = 0; i < kQueries; ++i) {
        const float lse = q0 + i < q1 ? a.logSumExp.data<float>()[(b * H + head) * Tq + q0 + i] : -kInfinity;
        // A query that sees nothing: +infinity makes every p zero.
        my.logSumExp[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;
        my.delta[i] = 0;
        if (q0 + i >= q1) continue;
        const T* out = a.out.data<T>() + at + i * H * D;
        my.delta[i] = laneSum(D, [&](int64_t d) { return toFloat(out[d]) * toFloat(dout[i * H * D + d]); });
      }
      const KeyRange all = visibleByPosition(rule, q0, q1, 0, S);
      for (int64_t j = all.begin / kKeys; j < divideUp(all.end, kKeys); ++j) {
        const int64_t block = pair * keyBlocks + j, j0 = j * kKeys;
        backwardBlock<Math>(
            a, layout, rule, q0, q1,
            {keys + block * layout.alongRow, keyColumns + block * layout.ofColumns, values + block * layout.alongRow,
             dk + j0 * layout.paddedD, dv + j0 * layout.paddedD, j0, std::min(S, j0 + kKeys)},
            my);
      }
      for (int64_t i = 0; i < q1 - q0; ++i) {
        T* to = a.dq.data<T>() + at + i * H * D;
        for (int64_t d = 0; d < D; ++d) to[d] = fromFloat<T>(my.dq[i * layout.paddedD + d] * a.scale);
      }
    }
    if (parts == 1) storeKeyGradients(pair, 0, S, dk);
  });
  if (parts == 1) return;
  context.pool.parallelFor(pairs * keyBlocks, [&](int64_t task, int) {
    const int64_t pair = task / keyBlocks, j0 = task % keyBlocks * kKeys;
    storeKeyGradients(pair, j0, std::min(S, j0 + kKeys), sums + pair * parts * 2 * sumSize);
  });
}

}  // namespace

}  // namespace attention

void attentionBackward(Context& context, const AttentionBackward& a) {
  attention::dispatchMath(
      a.q.dtype, [&](auto math, auto zero) { attention::backward<decltype(math), decltype(zero)>(context, a); });
}

}  // namespace qlora::QLORA_ISA
