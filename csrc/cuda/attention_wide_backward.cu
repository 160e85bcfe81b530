// Attention's backward for many rows: the kernels `queries` and `keys` of attention_backward.cu. Products go on beside
// all else; of a tile of keys, for the rows' dq:
//
//   barrier                         the tile is there; the one before the last has been read
//   begin s = q k^T;  begin dp = dout v^T;  begin copying the next tile
//   wait for s;  p of it
//   wait for dp;  ds of both;  begin dq += ds k
//
// and for the keys' dk and dv the same of the transposes, with dv += p^T dout begun once p is there. The last product
// of a tile is still under way when those of the next begin: hence three stages, where products are begun and not done.
#include "cuda/attention_wide.h"

namespace qlora::cuda::attention {

namespace {

template <class T, int kD, bool groups>
struct BackwardShape {
  static constexpr int visited = groups ? 64 : 32, stages = groups ? 3 : 2;

  struct alignas(groups ? kSwizzledBytes : 16) Stage {
    T first[visited * kD], second[visited * kD];  // keys and values, or queries and douts
  };
  struct alignas(groups ? kSwizzledBytes : 16) Shared {
    T first[kWideOwned * kD], second[kWideOwned * kD];
    Stage stage[stages];
    alignas(16) float logSumExp[stages][visited], delta[stages][visited];
  };
};

/// p of scores, into words; in place of scores p, times 1 - x^2 where x = tanh(..) of a score. Those not seen are
/// -infinity. logSumExp(n, h) gives that of element h of a lane's two rows, or columns, of block n.
template <class T, bool byRow, bool capped, int blocks, class LogSumExp>
QLORA_DEVICE void weigh(float (&s)[blocks][4], uint32_t (&words)[blocks / 2][4], float multiplier,
                        LogSumExp&& logSumExp) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
    const float2 of = logSumExp(n);
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = s[n][e];
      p[e] = exp2Fast(fmaf(x, multiplier, (byRow ? e / 2 : e % 2) ? -of.y : -of.x));
      s[n][e] = capped ? p[e] * fmaxf(0.0f, fmaf(-x, x, 1.0f)) : p[e];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) words[n / 2][n % 2 * 2 + h] = packWord<T>(p[2 * h], p[2 * h + 1]);
  }
}

/// The same, of a problem.
template <class T, bool byRow, int blocks, class LogSumExp>
QLORA_DEVICE void weigh(const Problem<T>& a, float (&s)[blocks][4], uint32_t (&words)[blocks / 2][4], bool edge,
                        const Sight& sight, int first, LogSumExp&& logSumExp) {
  if (a.inverseCap > 0) tanhOfTile(s, a.inverseCap);
  if (edge) sight.template forEachUnseen<blocks>(first, [&](int n, int e) { s[n][e] = -INFINITY; });
  if (a.inverseCap > 0) {
    weigh<T, byRow, true>(s, words, a.multiplier, logSumExp);
  } else {
    weigh<T, byRow, false>(s, words, a.multiplier, logSumExp);
  }
}

/// ds, in words, of p and dp.
template <class T, bool byRow, int blocks, class Delta>
QLORA_DEVICE void differentiate(const float (&p)[blocks][4], const float (&dp)[blocks][4],
                                uint32_t (&words)[blocks / 2][4], Delta&& delta) {
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
    const float2 of = delta(n);
    float ds[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[e] = p[n][e] * (dp[n][e] - ((byRow ? e / 2 : e % 2) ? of.y : of.x));
#pragma unroll
    for (int h = 0; h < 2; ++h) words[n / 2][n % 2 * 2 + h] = packWord<T>(ds[2 * h], ds[2 * h + 1]);
  }
}

template <class T, int kD, bool groups>
__global__ void __launch_bounds__(kWideThreads, 1) wideQueryKernel(Problem<T> a, Gradients<T> g) {
  using Shape = BackwardShape<T, kD, groups>;
  constexpr int kKeys = Shape::visited, kBlocks = kKeys / 8;
  auto& shared = wideShared<typename Shape::Shared>();

  const Pair pair(a, wideHead(a.Hkv), static_cast<int>(blockIdx.y));
  const int block = static_cast<int>(gridDim.x) / a.Hkv - 1 - wideBlock(a.Hkv);
  const int r0 = block * kWideOwned, r1 = min(r0 + kWideOwned, pair.rows);
  const int last = pair.lastSeen(r1);
  const Segments own = pair.keySegments ? segmentsOf(pair.querySegments, r0, r1, pair.group) : Segments{};
  const auto nextTile = [&](int j) {
    while (pair.keySegments && j < last && !own.meet(segmentsOf(pair.keySegments, j, min(j + kKeys, last), 1))) {
      j += kKeys;
    }
    return j;
  };
  const auto copy = [&](typename Shape::Stage& stage, int j) {
    if (j < last) {
      copyRows<kKeys, kD>(stage.first, a.D, a.k + pair.keyAt(j), pair.keyStride, last - j);
      copyRows<kKeys, kD>(stage.second, a.D, a.v + pair.keyAt(j), pair.keyStride, last - j);
    }
    commitCopies();
  };
  const auto copyOwn = [&](T* tile, const T* from) {
    copyRows<kWideOwned, kD>(tile, a.D, [&](int i) { return r0 + i < r1 ? from + pair.rowAt(r0 + i) : nullptr; });
  };
  copyOwn(shared.first, a.q);
  copyOwn(shared.second, g.dout);
  int j = nextTile(pair.firstSeen(r0)), stage = 0;
  copy(shared.stage[0], j);

  const int r = r0 + 16 * warpIndex() + laneIndex() / 4;
  const Sight sight = Sight::ofRows(pair, r, last);
  const int fullFrom = pair.firstSeen(r1 - 1), fullTo = pair.keySegments ? 0 : min(last, pair.lastSeen(r0 + 1));
  const int64_t firstRow = (int64_t{blockIdx.y} * a.Hkv + wideHead(a.Hkv)) * g.stride;
  const auto ofRows = [&](const float* from, float none) {
    return float2{r < pair.rows ? from[firstRow + r] : none, r + 8 < pair.rows ? from[firstRow + r + 8] : none};
  };
  const float2 logSumExp = ofRows(g.logSumExp, INFINITY), delta = ofRows(g.delta, 0.0f);
  float sums[kD / 8][4] = {};
  if (j < last) {
    do {
      auto& tile = shared.stage[stage];
      waitForCopies<0>();
      if constexpr (groups) showToGroups();
      syncBlock();
      float s[kBlocks][4], dp[kBlocks][4];
      beginTransposed<groups, kWideOwned, kD>(s, shared.first, tile.first);
      beginTransposed<groups, kWideOwned, kD>(dp, shared.second, tile.second);
      const int next = nextTile(j + kKeys);
      stage = stage + 1 < Shape::stages ? stage + 1 : 0;
      copy(shared.stage[stage], next);
      uint32_t words[kBlocks / 2][4];
      waitForGroups<1>(s);
      weigh<T, true>(a, s, words, j < fullFrom || j + kKeys > fullTo, sight, j, [&](int) { return logSumExp; });
      uint32_t all = 0;
#pragma unroll
      for (const auto& four : words) all |= four[0] | four[1] | four[2] | four[3];
      if constexpr (groups) beforeWaiting(all, &shared.first);
      waitForGroups<0>(dp);
      differentiate<T, true>(s, dp, words, [&](int) { return delta; });
      beginByWeights<groups, T>(sums, words, tile.first);
      j = next;
    } while (j < last);
    waitForGroups<0>(sums);
  }
  waitForCopies<0>();
  syncBlock();
  const float factor[2] = {g.scale, g.scale};
  storeRows<kD>(shared.first, a.D, sums, factor,
                [&](int i) { return r0 + i < r1 ? g.dq + pair.rowAt(r0 + i) : nullptr; });
}

template <class T, int kD, bool groups>
__global__ void __launch_bounds__(kWideThreads, 1) wideKeyKernel(Problem<T> a, Gradients<T> g) {
  using Shape = BackwardShape<T, kD, groups>;
  constexpr int kRows = Shape::visited, kBlocks = kRows / 8;
  auto& shared = wideShared<typename Shape::Shared>();

  const Pair pair(a, wideHead(a.Hkv), static_cast<int>(blockIdx.y));
  const int j0 = wideBlock(a.Hkv) * kWideOwned, j1 = min(j0 + kWideOwned, a.S);
  const int last = pair.lastRow(j1);
  const Segments own = pair.keySegments ? segmentsOf(pair.keySegments, j0, j1, 1) : Segments{};
  const auto nextTile = [&](int r) {
    while (pair.keySegments && r < last &&
           !own.meet(segmentsOf(pair.querySegments, r, min(r + kRows, last), pair.group))) {
      r += kRows;
    }
    return r;
  };
  const RowSteps<kD> steps(pair.group);
  const int64_t firstRow = (int64_t{blockIdx.y} * a.Hkv + wideHead(a.Hkv)) * g.stride;
  const auto copy = [&](int stage, int r) {
    if (r < last) {
      auto& tile = shared.stage[stage];
      copyRows<kRows, kD>(tile.first, tile.second, a.q, g.dout, pair, steps, r, last);
      const int at = static_cast<int>(threadIdx.x) % (kRows / 4) * 4,
                which = static_cast<int>(threadIdx.x) / (kRows / 4);
      if (which < 2) {
        copyAsync16((which ? shared.delta : shared.logSumExp)[stage] + at,
                    (which ? g.delta : g.logSumExp) + firstRow + r + at, r + at < g.stride);
      }
    }
    commitCopies();
  };
  copyRows<kWideOwned, kD>(shared.first, a.D, a.k + pair.keyAt(j0), pair.keyStride, j1 - j0);
  copyRows<kWideOwned, kD>(shared.second, a.D, a.v + pair.keyAt(j0), pair.keyStride, j1 - j0);
  // Statistics are copied by fours.
  int r = nextTile(pair.firstRow(j0) / 4 * 4), stage = 0;
  copy(0, r);

  const Sight sight = Sight::ofKeys(pair, j0 + 16 * warpIndex() + laneIndex() / 4, j1, last);
  const int fullFrom = pair.firstRow(j1 - 1), fullTo = pair.keySegments ? 0 : min(last, pair.lastRow(j0 + 1));
  float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
  if (r < last) {
    do {
      auto& tile = shared.stage[stage];
      waitForCopies<0>();
      if constexpr (groups) showToGroups();
      syncBlock();
      float s[kBlocks][4], dp[kBlocks][4];
      beginTransposed<groups, kWideOwned, kD>(s, shared.first, tile.first);
      beginTransposed<groups, kWideOwned, kD>(dp, shared.second, tile.second);
      const int next = nextTile(r + kRows), now = stage;
      stage = stage + 1 < Shape::stages ? stage + 1 : 0;
      copy(stage, next);
      const auto ofRows = [&](const float(&from)[kRows]) {
        return [&from](int n) { return *reinterpret_cast<const float2*>(from + 8 * n + laneIndex() % 4 * 2); };
      };
      uint32_t words[kBlocks / 2][4], more[kBlocks / 2][4];
      waitForGroups<1>(s);
      weigh<T, false>(a, s, words, r < fullFrom || r + kRows > fullTo, sight, r, ofRows(shared.logSumExp[now]));
      beginByWeights<groups, T>(dv, words, tile.second);
      waitForGroups<1>(dp);
      differentiate<T, false>(s, dp, more, ofRows(shared.delta[now]));
      beginByWeights<groups, T>(dk, more, tile.first);
      waitForGroups<1>(dv);
      r = next;
    } while (r < last);
    waitForGroups<0>(dk);
    waitForGroups<0>(dv);
  }
  waitForCopies<0>();
  syncBlock();
  const auto store = [&](T* tile, T* to, const float(&sums)[kD / 8][4], float by) {
    const float factor[2] = {by, by};
    storeRows<kD>(tile, a.D, sums, factor, [&](int i) { return j0 + i < j1 ? to + pair.keyAt(j0 + i) : nullptr; });
  };
  store(shared.first, g.dk, dk, g.scale);
  store(shared.second, g.dv, dv, 1.0f);
}

}  // namespace

template <class T>
void backwardWide(Context& context, const Problem<T>& a, const Gradients<T>& g, int64_t B) {
  const auto blocksOf = [](int64_t n) { return (n + kWideOwned - 1) / kWideOwned; };
  dispatchWide(context, a.D, [&](auto size, auto groups) {
    constexpr int kD = decltype(size)::value;
    constexpr bool kGroups = decltype(groups)::value;
    constexpr size_t kBytes = wideBytes<typename BackwardShape<T, kD, kGroups>::Shared>;
    launch(context, wideQueryKernel<T, kD, kGroups>, wideGrid(blocksOf(a.rows()), a.Hkv, B), kWideThreads, kBytes, a,
           g);
    launch(context, wideKeyKernel<T, kD, kGroups>, wideGrid(blocksOf(a.S), a.Hkv, B), kWideThreads, kBytes, a, g);
  });
}

template void backwardWide(Context&, const Problem<bf16>&, const Gradients<bf16>&, int64_t);
template void backwardWide(Context&, const Problem<f16>&, const Gradients<f16>&, int64_t);

}  // namespace qlora::cuda::attention
