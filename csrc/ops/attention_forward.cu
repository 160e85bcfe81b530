// Attention on a GPU, forward; cuda/attention_tiles.h says how rows and tiles are laid out. A block keeps its queries,
// and of each row the largest score m, the sum l of exp(s - m), and out = sum exp(s - m) v, which it rescales when a
// tile of keys raises m. While scores are made of a tile of keys the tile of values is on its way, and the next keys
// while those are used.
//
// Where there are few rows (decoding), that is few blocks, keys are split into parts with blocks of their own, which
// leave m, l and out in scratch for combineKernel. The number of parts depends on shapes alone. pastLength is read by
// the kernels; one out of range is refused where JavaScript wrote the values that the operation sees, and is else taken
// for the nearest within range.
#include "cuda/attention_wide.h"
#include "ops/attention.h"

namespace qlora::cuda {

namespace attention {

namespace {

// Blocks that keep a large GPU busy, and the fewest keys that are worth a block of their own.
constexpr int64_t kBlocksWanted = 512, kFewestKeys = 128;

template <class T, int kD, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    forwardKernel(Problem<T> a, Parts parts, T* out, float* logSumExp) {
  using Tile = Tiling<T, kD>;
  constexpr int kRows = 16 * kWarps, kKeys = 2 * Tile::kVisited, kTiles = kKeys / 8, kColumns = kD / 8;
  constexpr int kStride = Tile::kStride;
  T *const queries = dynamicShared<T>(), *const keys = queries + kRows * kStride,
           *const values = keys + kKeys * kStride;

  beginEarly();
  const Pair pair(a, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
  // The last rows, which see most where attention is causal, first.
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x), part = block % parts.count;
  const int r0 = block / parts.count * kRows, r1 = min(r0 + kRows, pair.rows);
  const int first = max(pair.firstSeen(r0), part * parts.keys);
  const int last = min(pair.lastSeen(r1), min(part + 1, INT32_MAX / parts.keys) * parts.keys);
  const Segments own = pair.keySegments ? segmentsOf(pair.querySegments, r0, r1, pair.group) : Segments{};
  // The tile from j on, or the next one that a row may see a key of.
  const auto nextTile = [&](int j) {
    while (pair.keySegments && j < last && !own.meet(segmentsOf(pair.keySegments, j, min(j + kKeys, last), 1))) {
      j += kKeys;
    }
    return j;
  };
  const auto load = [&](T* tile, const T* from, int j0) {
    loadTile<T, kD, kKeys>(tile, a.D, [&](int j) { return j0 + j < last ? from + pair.keyAt(j0 + j) : nullptr; });
    commitCopies();
  };

  const int r = 16 * warpIndex() + laneIndex() / 4, t = 2 * (laneIndex() % 4);
  const Seer seers[2] = {pair.seer(r0 + r), pair.seer(r0 + r + 8)};
  float sums[kColumns][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  int j0 = nextTile(first);
  loadTile<T, kD, kRows>(queries, a.D, [&](int i) { return r0 + i < r1 ? a.q + pair.rowAt(r0 + i) : nullptr; });
  load(keys, a.k, j0);
  while (j0 < last) {
    waitForCopies<0>();
    syncBlock();
    load(values, a.v, j0);
    float p[kTiles][4] = {};
    multiplyTransposed<T, kD>(p, queries + 16 * warpIndex() * kStride, keys);
    if (a.inverseCap > 0) tanhOfTile(p, a.inverseCap);
    const bool all = pair.seesAll(r0, r1, j0, min(j0 + kKeys, last)) && j0 + kKeys <= last;
    float tileLargest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = j0 + 8 * n + t + e % 2;
        float s = a.multiplier * p[n][e];
        if (!all && (key >= last || !pair.sees(seers[e / 2], key))) s = -INFINITY;
        p[n][e] = s;
        tileLargest[e / 2] = fmaxf(tileLargest[e / 2], s);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = fmaxf(tileLargest[h], shuffleXor(tileLargest[h], 1));
      m = fmaxf(largest[h], fmaxf(m, shuffleXor(m, 2)));
      // Of a row that has seen nothing yet; any number does.
      const float base = m == -INFINITY ? 0.0f : m, rescale = exp2f(largest[h] - base);
      largest[h] = m;
      total[h] *= rescale;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        sums[n][2 * h] *= rescale;
        sums[n][2 * h + 1] *= rescale;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        p[n][2 * h] = exp2f(p[n][2 * h] - base);
        p[n][2 * h + 1] = exp2f(p[n][2 * h + 1] - base);
        total[h] += p[n][2 * h] + p[n][2 * h + 1];
      }
    }
    waitForCopies<0>();
    syncBlock();
    j0 = nextTile(j0 + kKeys);
    load(keys, a.k, j0);
    multiplyByWeights<T, kD>(sums, p, values);
  }
  waitForCopies<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += shuffleXor(total[h], 1);
    total[h] += shuffleXor(total[h], 2);
    const int row = r0 + r + 8 * h;
    if (row >= r1) continue;
    if (parts.count > 1) {
      const int64_t pairs = int64_t{gridDim.y} * gridDim.z, index = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
      const int64_t at = (part * pairs + index) * pair.rows + row;
      storeRow(parts.out + at * a.D, 0, a.D, sums, h, 1.0f);
      if (t == 0) {
        parts.largest[at] = largest[h];
        parts.sum[at] = total[h];
      }
    } else {
      storeRow(out + pair.rowAt(row), 0, a.D, sums, h, total[h] == 0 ? 0.0f : 1.0f / total[h]);
      if (t == 0) {
        logSumExp[pair.statisticAt(row)] = total[h] == 0 ? -INFINITY : largest[h] * kLn2 + logf(total[h]);
      }
    }
  }
}

/// A warp a row.
template <class T>
__global__ void combineKernel(Problem<T> a, Parts parts, int64_t pairs, T* out, float* logSumExp) {
  beginEarly();
  const int rows = a.Tq * (a.H / a.Hkv);
  const int64_t index = threadIndex() / kWarpSize;
  if (index >= pairs * rows) return;  // a whole warp
  const int64_t b = index / rows / a.Hkv;
  const Pair pair(a, static_cast<int>(index / rows % a.Hkv), static_cast<int>(b));
  const int row = static_cast<int>(index % rows);
  float m = -INFINITY, total = 0;
  for (int part = 0; part < parts.count; ++part) m = fmaxf(m, parts.largest[part * pairs * rows + index]);
  const float base = m == -INFINITY ? 0.0f : m;
  for (int part = 0; part < parts.count; ++part) {
    const int64_t at = part * pairs * rows + index;
    total += parts.sum[at] * exp2f(parts.largest[at] - base);
  }
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int d = laneIndex(); d < a.D; d += kWarpSize) {
    float sum = 0;
    for (int part = 0; part < parts.count; ++part) {
      const int64_t at = part * pairs * rows + index;
      sum += parts.out[at * a.D + d] * exp2f(parts.largest[at] - base);
    }
    out[pair.rowAt(row) + d] = fromFloat<T>(sum * inverse);
  }
  if (laneIndex() == 0) logSumExp[pair.statisticAt(row)] = total == 0 ? -INFINITY : m * kLn2 + logf(total);
}

template <class T, int kD, int kWarps>
void forward(Context& context, const AttentionForward& a) {
  constexpr int kRows = 16 * kWarps;
  Problem<T> problem = Problem<T>::of(a);
  problem.pastLength = a.pastLength.dataOrNull<int32_t>();
  const int64_t B = a.q.dim(0), Hkv = a.k.dim(2), S = a.k.dim(1), rows = problem.rows();
  const int64_t rowBlocks = (rows + kRows - 1) / kRows, blocks = B * Hkv * rowBlocks;
  if (blocks == 0) return;
  const int64_t most = std::max<int64_t>(1, std::min(kBlocksWanted / blocks, S / kFewestKeys));
  // Whole tiles, and as many parts as then have a key.
  const int64_t keys = std::max<int64_t>(64, ((S + most - 1) / most + 63) / 64 * 64);
  const int64_t count = std::max<int64_t>(1, (S + keys - 1) / keys);
  Parts parts{static_cast<int>(count), static_cast<int>(keys), nullptr, nullptr, nullptr};
  if (count > 1) {
    const int64_t n = count * B * Hkv * rows;
    parts.largest = context.scratch.take<float>(n);
    parts.sum = context.scratch.take<float>(n);
    parts.out = context.scratch.take<float>(n * a.q.dim(3));
  }
  T* out = a.out.data<T>();
  float* logSumExp = a.logSumExp.data<float>();
  bool done = false;
  if constexpr (sizeof(T) == 2) {
    done = isWide(context, a.q.dtype, problem.D, rows);
    if (done) forwardWide(context, problem, parts, B, out, logSumExp);
  }
  if (!done) {
    const dim3 grid(static_cast<unsigned>(rowBlocks * count), static_cast<unsigned>(Hkv), static_cast<unsigned>(B));
    launchEarly(context, forwardKernel<T, kD, kWarps>, grid, kWarps * kWarpSize,
                Tiling<T, kD>::bytes(kRows + 4 * Tiling<T, kD>::kVisited), problem, parts, out, logSumExp);
  }
  if (count > 1) {
    launchEarly(context, combineKernel<T>, (B * Hkv * rows * kWarpSize + kThreads - 1) / kThreads, kThreads, 0, problem,
                parts, B * Hkv, out, logSumExp);
  }
}

void checkPastLength(const AttentionForward& a) {
  if (!a.pastLength.defined() || !a.pastLength.storage->hostCopy) return;
  const int64_t most = a.k.dim(1) - a.q.dim(1);
  for (int64_t b = 0; b < a.q.dim(0); ++b) {
    int32_t past;
    std::memcpy(&past, a.pastLength.storage->hostCopy->data() + b * static_cast<int64_t>(sizeof past), sizeof past);
    if (past < 0 || past > most) {
      fail("ERR_QLORA_SHAPE", "attention: pastLength[%lld] must be from 0 to %lld, got %d", static_cast<long long>(b),
           static_cast<long long>(most), past);
    }
  }
}

}  // namespace

}  // namespace attention

void attentionForward(Context& context, const AttentionForward& a) {
  attention::checkPastLength(a);
  const int64_t rows = a.q.dim(1) * (a.q.dim(2) / a.k.dim(2));
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    attention::dispatchHeadSize<T>("attention", a.q.dim(3), [&](auto size) {
      constexpr int kD = decltype(size)::value;
      if (rows <= 16) return attention::forward<T, kD, 1>(context, a);
      attention::forward<T, kD, attention::Tiling<T, kD>::kWarps>(context, a);
    });
  });
}

}  // namespace qlora::cuda
