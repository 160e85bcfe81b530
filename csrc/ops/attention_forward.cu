// Attention on a GPU, forward; cuda/attention_tiles.h says how rows and tiles are laid out. A block keeps its queries,
// and of each row the largest score m, the sum l of exp(s - m), and out = sum exp(s - m) v, which it rescales when a
// tile of keys raises m. While scores are made of a tile of keys the tile of values is on its way, and the next keys
// while those are used. Warps have rows of their own; or where there are few (decoding) keys of a tile, and add up what
// they have in the end.
//
// Where there are few rows, that is few blocks, keys are split into parts with blocks of their own, which leave m, l
// and out in scratch for combineKernel. The number of parts depends on shapes alone. pastLength is read by the kernels;
// one out of range is refused where JavaScript wrote the values that the operation sees, and is else taken for the
// nearest within range.
#include "cuda/attention_wide.h"
#include "ops/attention.h"

namespace qlora::cuda {

namespace attention {

namespace {

// Blocks that keep a large GPU busy, and the fewest keys that are worth a block of their own, where rows are many or
// few.
constexpr int64_t kBlocksWanted = 512, kFewestKeys = 128, kFewestKeysOfFew = 64;
constexpr int kCombineThreads = 128;

/// Keys of a tile that a warp has where warps share rows, and how many warps then are.
constexpr int kKeysOfWarp = 16;
template <class T, int kD>
constexpr int kKeyWarps = 2 * Tiling<T, kD>::kVisited / kKeysOfWarp;

template <class T, int kD, int kRowWarps, int kKeyWarps>
__global__ void __launch_bounds__(kRowWarps* kKeyWarps* kWarpSize)
    forwardKernel(Problem<T> a, Parts parts, T* out, float* logSumExp) {
  using Tile = Tiling<T, kD>;
  constexpr int kRows = 16 * kRowWarps, kKeys = 2 * Tile::kVisited, kTiles = kKeys / kKeyWarps / 8, kColumns = kD / 8;
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

  const int firstRow = warpIndex() % kRowWarps * 16, firstKey = warpIndex() / kRowWarps * 8 * kTiles;
  const int r = firstRow + laneIndex() / 4, t = firstKey + 2 * (laneIndex() % 4);
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
    multiplyTransposed<T, kD>(p, queries + firstRow * kStride, keys + firstKey * kStride);
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
    multiplyByWeights<T, kD>(sums, p, values + firstKey * kStride);
  }
  waitForCopies<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += shuffleXor(total[h], 1);
    total[h] += shuffleXor(total[h], 2);
  }
  const int64_t pairs = int64_t{gridDim.y} * gridDim.z, index = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  const int64_t firstOfPart = (part * pairs + index) * pair.rows;
  const auto storeStatistics = [&](int row, float m, float sum) {
    if (parts.count > 1) {
      parts.largest[firstOfPart + row] = m;
      parts.sum[firstOfPart + row] = sum;
    } else {
      logSumExp[pair.statisticAt(row)] = sum == 0 ? -INFINITY : m * kLn2 + logf(sum);
    }
  };
  if constexpr (kKeyWarps == 1) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = r0 + r + 8 * h;
      if (row >= r1) continue;
      if (parts.count > 1) {
        storeRow(parts.out + (firstOfPart + row) * a.D, 0, a.D, sums, h, 1.0f);
      } else {
        storeRow(out + pair.rowAt(row), 0, a.D, sums, h, total[h] == 0 ? 0.0f : 1.0f / total[h]);
      }
      if (t == 0) storeStatistics(row, largest[h], total[h]);
    }
  } else {
    // [warps, rows] and, where the tiles were, [warps, rows, kD].
    QLORA_SHARED_ARRAY(float, largests, kKeyWarps* kRows);
    QLORA_SHARED_ARRAY(float, totals, kKeyWarps* kRows);
    static_assert(kRowWarps == 1 && kKeyWarps * kRows * kD * sizeof(float) <= 2 * Tile::bytes(kKeys));
    auto* const all = reinterpret_cast<float*>(keys);
    const int own = warpIndex() * kRows + laneIndex() / 4;
    syncBlock();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (laneIndex() % 4 == 0) {
        largests[own + 8 * h] = largest[h];
        totals[own + 8 * h] = total[h];
      }
      storeRow(all + (own + 8 * h) * kD, 0, kD, sums, h, 1.0f);
    }
    syncBlock();
    for (int i = static_cast<int>(threadIdx.x); i < (r1 - r0) * a.D; i += static_cast<int>(blockDim.x)) {
      const int row = i / a.D, d = i % a.D;
      float m = -INFINITY, sum = 0, weights = 0;
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) m = fmaxf(m, largests[w * kRows + row]);
      const float base = m == -INFINITY ? 0.0f : m;
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) {
        const float factor = exp2f(largests[w * kRows + row] - base);
        weights = fmaf(factor, totals[w * kRows + row], weights);
        sum = fmaf(factor, all[(w * kRows + row) * kD + d], sum);
      }
      if (parts.count > 1) {
        parts.out[(firstOfPart + r0 + row) * a.D + d] = sum;
      } else {
        out[pair.rowAt(r0 + row) + d] = fromFloat<T>(weights == 0 ? 0.0f : sum / weights);
      }
      if (d == 0) storeStatistics(r0 + row, m, weights);
    }
  }
}

/// A block a row.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combineKernel(Problem<T> a, Parts parts, T* out, float* logSumExp) {
  QLORA_SHARED_ARRAY(float, weights, kBlocksWanted);
  beginEarly();
  const Pair pair(a, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int64_t rows = int64_t{pair.rows} * gridDim.y * gridDim.z;
  const int64_t first = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * pair.rows + row;
  float m = -INFINITY, total = 0;
  for (int part = thread; part < parts.count; part += kCombineThreads) {
    m = fmaxf(m, parts.largest[part * rows + first]);
  }
  m = blockMax(m);
  const float base = m == -INFINITY ? 0.0f : m;
  for (int part = thread; part < parts.count; part += kCombineThreads) {
    weights[part] = exp2f(parts.largest[part * rows + first] - base);
    total += parts.sum[part * rows + first] * weights[part];
  }
  total = blockSum(total);
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int d = thread; d < a.D; d += kCombineThreads) {
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < parts.count; ++part) {
      sum = fmaf(parts.out[(part * rows + first) * a.D + d], weights[part], sum);
    }
    out[pair.rowAt(row) + d] = fromFloat<T>(sum * inverse);
  }
  if (thread == 0) logSumExp[pair.statisticAt(row)] = total == 0 ? -INFINITY : m * kLn2 + logf(total);
}

template <class T, int kD, int kRowWarps, int kKeyWarps>
void forward(Context& context, const AttentionForward& a) {
  constexpr int kRows = 16 * kRowWarps, kWarps = kRowWarps * kKeyWarps;
  Problem<T> problem = Problem<T>::of(a);
  problem.pastLength = a.pastLength.dataOrNull<int32_t>();
  const int64_t B = a.q.dim(0), Hkv = a.k.dim(2), S = a.k.dim(1), rows = problem.rows();
  const int64_t rowBlocks = (rows + kRows - 1) / kRows, blocks = B * Hkv * rowBlocks;
  if (blocks == 0) return;
  const int64_t most =
      std::max<int64_t>(1, std::min(kBlocksWanted / blocks, S / (rows <= kFewRows ? kFewestKeysOfFew : kFewestKeys)));
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
    launchEarly(context, forwardKernel<T, kD, kRowWarps, kKeyWarps>, grid, kWarps * kWarpSize,
                Tiling<T, kD>::bytes(kRows + 4 * Tiling<T, kD>::kVisited), problem, parts, out, logSumExp);
  }
  if (count > 1) {
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(Hkv), static_cast<unsigned>(B));
    launchEarly(context, combineKernel<T>, grid, kCombineThreads, 0, problem, parts, out, logSumExp);
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
      using namespace attention;
      if (rows <= kFewRows) return forward<T, kD, 1, kKeyWarps<T, kD>>(context, a);
      forward<T, kD, Tiling<T, kD>::kWarps, 1>(context, a);
    });
  });
}

}  // namespace qlora::cuda
