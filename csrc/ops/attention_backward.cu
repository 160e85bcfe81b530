// Attention on a GPU, backward; cuda/attention_tiles.h says how rows and tiles are laid out. Three kernels, none of
// which adds to what another block has written, so that all sums have a fixed order:
//
//   rows     dot(dout, out) of each row, and its logSumExp beside
//   queries  a block owns rows: p and ds of them with each tile of keys, dq += ds k
//   keys     a block owns keys: p^T and ds^T of them with each tile of rows, dv += p^T dout, dk += ds^T q; of a head
//            of more than 128 elements each block sums 128 columns, for which it has the registers
//
// p and ds are thus made twice, for which nothing is read and added again in memory. In 16-bit types they are rounded
// to that type before the second product.
#include "cuda/attention_wide.h"
#include "ops/attention.h"

namespace qlora::cuda {

namespace attention {

namespace {

/// What p and ds need of a row.
struct RowStatistics {
  float logSumExp, delta;
};

template <class T>
QLORA_DEVICE RowStatistics statisticsOf(const Gradients<T>& g, const Pair& pair, int row) {
  if (row >= pair.rows) return {INFINITY, 0.0f};
  const int64_t at = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * g.stride + row;
  return {g.logSumExp[at], g.delta[at]};
}

/// p and ds, in place of x = dot(q, k), or tanh(inverseCap x), and dp = dot(dout, v).
template <class T>
QLORA_DEVICE void differentiate(const Problem<T>& a, const RowStatistics& row, bool seen, float& x, float& dp) {
  const float p = seen ? exp2f(a.multiplier * x - row.logSumExp) : 0.0f;
  dp = p * (dp - row.delta);
  if (a.inverseCap > 0) dp *= 1.0f - x * x;
  x = p;
}

/// A warp a row, of which it makes the gradients' statistics.
template <class T>
__global__ void rowKernel(Problem<T> a, Gradients<T> g, const T* out, const float* logSumExp, float* ofRows,
                          float* delta) {
  const int row = static_cast<int>(threadIndex() / kWarpSize);
  if (row >= g.stride) return;  // a whole warp
  const Pair pair(a, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
  float sum = 0, own = INFINITY;
  if (row < pair.rows) {
    const T *x = out + pair.rowAt(row), *y = g.dout + pair.rowAt(row);
    if (a.D % 4 == 0) {
      for (int d = 4 * laneIndex(); d < a.D; d += 4 * kWarpSize) {
        const auto xs = loadPack<4>(x + d), ys = loadPack<4>(y + d);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(toFloat(xs.value[e]), toFloat(ys.value[e]), sum);
      }
    } else {
      for (int d = laneIndex(); d < a.D; d += kWarpSize) sum = fmaf(toFloat(x[d]), toFloat(y[d]), sum);
    }
    own = logSumExp[pair.statisticAt(row)];
    own = own == -INFINITY ? INFINITY : own * kLog2E;
  }
  sum = warpSum(sum);
  if (laneIndex() != 0) return;
  const int64_t at = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * g.stride + row;
  ofRows[at] = own;
  delta[at] = sum;
}

template <class T, int kD>
__global__ void __launch_bounds__(Tiling<T, kD>::kWarps* kWarpSize) queryKernel(Problem<T> a, Gradients<T> g) {
  using Tile = Tiling<T, kD>;
  constexpr int kRows = 16 * Tile::kWarps, kKeys = Tile::kVisited, kTiles = kKeys / 8, kColumns = kD / 8;
  constexpr int kStride = Tile::kStride;
  T *const queries = dynamicShared<T>(), *const douts = queries + kRows * kStride;
  T *const keys = douts + kRows * kStride, *const values = keys + kKeys * kStride;

  const Pair pair(a, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
  const int r0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows, r1 = min(r0 + kRows, pair.rows);
  const int first = pair.firstSeen(r0), last = pair.lastSeen(r1);
  const Segments own = pair.keySegments ? segmentsOf(pair.querySegments, r0, r1, pair.group) : Segments{};
  const auto rowsOf = [&](const T* from) {
    return [=, &pair](int i) { return r0 + i < r1 ? from + pair.rowAt(r0 + i) : nullptr; };
  };
  loadTile<T, kD, kRows>(queries, a.D, rowsOf(a.q));
  loadTile<T, kD, kRows>(douts, a.D, rowsOf(g.dout));

  const int at = 16 * warpIndex(), r = at + laneIndex() / 4, t = 2 * (laneIndex() % 4);
  const Seer seers[2] = {pair.seer(r0 + r), pair.seer(r0 + r + 8)};
  const RowStatistics statistics[2] = {statisticsOf(g, pair, r0 + r), statisticsOf(g, pair, r0 + r + 8)};
  float sums[kColumns][4] = {};
  for (int j0 = first; j0 < last; j0 += kKeys) {
    const int j1 = min(j0 + kKeys, last);
    if (pair.keySegments && !own.meet(segmentsOf(pair.keySegments, j0, j1, 1))) continue;
    syncBlock();
    const auto keysOf = [&](const T* from) {
      return [=, &pair](int j) { return j0 + j < j1 ? from + pair.keyAt(j0 + j) : nullptr; };
    };
    loadTile<T, kD, kKeys>(keys, a.D, keysOf(a.k));
    loadTile<T, kD, kKeys>(values, a.D, keysOf(a.v));
    commitCopies();
    waitForCopies<0>();
    syncBlock();
    float p[kTiles][4] = {}, ds[kTiles][4] = {};
    multiplyTransposed<T, kD>(p, queries + at * kStride, keys);
    multiplyTransposed<T, kD>(ds, douts + at * kStride, values);
    if (a.inverseCap > 0) tanhOfTile(p, a.inverseCap);
    const bool all = pair.seesAll(r0, r1, j0, j0 + kKeys);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = all || pair.sees(seers[e / 2], j0 + 8 * n + t + e % 2);
        differentiate(a, statistics[e / 2], seen, p[n][e], ds[n][e]);
      }
    }
    multiplyByWeights<T, kD>(sums, ds, keys);
  }
  waitForCopies<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = r0 + r + 8 * h;
    if (row < r1) storeRow(g.dq + pair.rowAt(row), 0, a.D, sums, h, g.scale);
  }
}

template <class T, int kD, int kOut>
__global__ void __launch_bounds__(Tiling<T, kD>::kWarps* kWarpSize) keyKernel(Problem<T> a, Gradients<T> g) {
  using Tile = Tiling<T, kD>;
  constexpr int kKeys = 16 * Tile::kWarps, kRows = Tile::kVisited, kTiles = kRows / 8, kColumns = kOut / 8;
  constexpr int kStride = Tile::kStride, kParts = kD / kOut;
  T *const keys = dynamicShared<T>(), *const values = keys + kKeys * kStride;
  T *const queries = values + kKeys * kStride, *const douts = queries + kRows * kStride;
  QLORA_SHARED_ARRAY(RowStatistics, statistics, kRows);
  QLORA_SHARED_ARRAY(Seer, seers, kRows);

  const Pair pair(a, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
  const int block = static_cast<int>(blockIdx.x) / kParts, column = static_cast<int>(blockIdx.x) % kParts * kOut;
  const int j0 = block * kKeys, j1 = min(j0 + kKeys, a.S);
  const int first = pair.firstRow(j0), last = pair.lastRow(j1);
  const Segments own = pair.keySegments ? segmentsOf(pair.keySegments, j0, j1, 1) : Segments{};
  const auto keysOf = [&](const T* from) {
    return [=, &pair](int j) { return j0 + j < j1 ? from + pair.keyAt(j0 + j) : nullptr; };
  };
  loadTile<T, kD, kKeys>(keys, a.D, keysOf(a.k));
  loadTile<T, kD, kKeys>(values, a.D, keysOf(a.v));

  const int at = 16 * warpIndex(), j = j0 + at + laneIndex() / 4, t = 2 * (laneIndex() % 4);
  float dk[kColumns][4] = {}, dv[kColumns][4] = {};
  for (int r0 = first; r0 < last; r0 += kRows) {
    const int r1 = min(r0 + kRows, last);
    if (pair.keySegments && !own.meet(segmentsOf(pair.querySegments, r0, r1, pair.group))) continue;
    syncBlock();
    const auto rowsOf = [&](const T* from) {
      return [=, &pair](int i) { return r0 + i < r1 ? from + pair.rowAt(r0 + i) : nullptr; };
    };
    loadTile<T, kD, kRows>(queries, a.D, rowsOf(a.q));
    loadTile<T, kD, kRows>(douts, a.D, rowsOf(g.dout));
    commitCopies();
    if (static_cast<int>(threadIdx.x) < kRows) {
      const int row = r0 + static_cast<int>(threadIdx.x);
      statistics[threadIdx.x] = statisticsOf(g, pair, row < r1 ? row : pair.rows);
      seers[threadIdx.x] = pair.seer(row);
    }
    waitForCopies<0>();
    syncBlock();
    float p[kTiles][4] = {}, ds[kTiles][4] = {};
    multiplyTransposed<T, kD>(p, keys + at * kStride, queries);
    multiplyTransposed<T, kD>(ds, values + at * kStride, douts);
    if (a.inverseCap > 0) tanhOfTile(p, a.inverseCap);
    const bool all = pair.seesAll(r0, r0 + kRows, j0, j0 + kKeys);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 8 * n + t + e % 2;
        const bool seen = all || pair.sees(seers[i], j + e / 2 * 8);
        differentiate(a, statistics[i], seen, p[n][e], ds[n][e]);
      }
    }
    multiplyByWeights<T, kD>(dv, p, douts + column);
    multiplyByWeights<T, kD>(dk, ds, queries + column);
  }
  waitForCopies<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = j + 8 * h;
    if (key >= j1) continue;
    storeRow(g.dk + pair.keyAt(key), column, a.D, dk, h, g.scale);
    storeRow(g.dv + pair.keyAt(key), column, a.D, dv, h, 1.0f);
  }
}

template <class T, int kD>
void backward(Context& context, const AttentionBackward& a) {
  using Tile = Tiling<T, kD>;
  constexpr int kOwned = 16 * Tile::kWarps, kOut = std::min(kD, 128);
  const Problem<T> problem = Problem<T>::of(a);
  const int64_t B = a.q.dim(0), Hkv = a.k.dim(2), S = a.k.dim(1), pairs = B * Hkv;
  // Whole tiles of rows.
  const int64_t stride = (problem.rows() + 63) / 64 * 64;
  float* logSumExp = context.scratch.take<float>(pairs * stride);
  float* delta = context.scratch.take<float>(pairs * stride);
  const Gradients<T> gradients{a.dout.data<T>(), logSumExp,      delta,          stride,
                               a.dq.data<T>(),   a.dk.data<T>(), a.dv.data<T>(), a.scale};
  const auto grid = [&](int64_t blocks) {
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(Hkv), static_cast<unsigned>(B));
  };
  launch(context, rowKernel<T>, grid((stride * kWarpSize + kThreads - 1) / kThreads), kThreads, 0, problem, gradients,
         a.out.data<T>(), a.logSumExp.data<float>(), logSumExp, delta);
  if constexpr (sizeof(T) == 2) {
    if (isWide(context, a.q.dtype, problem.D, problem.rows())) return backwardWide(context, problem, gradients, B);
  }
  constexpr size_t bytes = Tile::bytes(2 * kOwned + 2 * Tile::kVisited);
  launch(context, queryKernel<T, kD>, grid((problem.rows() + kOwned - 1) / kOwned), Tile::kWarps * kWarpSize, bytes,
         problem, gradients);
  launch(context, keyKernel<T, kD, kOut>, grid((S + kOwned - 1) / kOwned * (kD / kOut)), Tile::kWarps * kWarpSize,
         bytes, problem, gradients);
}

}  // namespace

}  // namespace attention

void attentionBackward(Context& context, const AttentionBackward& a) {
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    attention::dispatchHeadSize<T>("attentionBackward", a.q.dim(3),
                                   [&](auto size) { attention::backward<T, decltype(size)::value>(context, a); });
  });
}

}  // namespace qlora::cuda
