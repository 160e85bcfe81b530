// Attention's forward for many rows. Of each tile of keys the scores are made while the weights of the tile before are
// multiplied with its values, and weighed while that product goes on:
//
//   barrier                         keys j + 1 and values j are there, keys j and values j - 1 have been read
//   begin scores j + 1;  begin sums += weights j x values j
//   begin copying keys j + 2, values j + 1
//   wait for the scores; weights j + 1 of them, and by what they rescale the sums
//   wait for the sums; rescale them
#include "cuda/attention_wide.h"

namespace qlora::cuda::attention {

namespace {

template <class T, int kD, bool groups>
struct ForwardShape {
  static constexpr int keys = groups && kD > 64 ? 128 : 64;
  static constexpr int blocksAtOnce = kD > 64 ? 1 : 2;

  struct alignas(groups ? kSwizzledBytes : 16) Shared {
    T queries[kWideOwned * kD], keys[2][ForwardShape::keys * kD], values[2][ForwardShape::keys * kD];
  };
};

/// Of a lane's two rows: the largest score yet, and the sum of exp2(score - largest) over the keys that it has.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};

  /// Scores, times `multiplier`, to weights; what was summed before is to be multiplied by `rescale`.
  template <int blocks>
  QLORA_DEVICE void weigh(float (&s)[blocks][4], float multiplier, float (&rescale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = s[0][2 * h], odd = s[0][2 * h + 1];
#pragma unroll
      for (int n = 1; n < blocks; ++n) {
        even = fmaxf(even, s[n][2 * h]);
        odd = fmaxf(odd, s[n][2 * h + 1]);
      }
      float m = fmaxf(even, odd);
      m = fmaxf(m, shuffleXor(m, 1));
      m = fmaxf(largest[h], multiplier * fmaxf(m, shuffleXor(m, 2)));
      // Of a row that has seen nothing yet; any number does.
      const float base = m == -INFINITY ? 0.0f : m;
      rescale[h] = exp2Fast(largest[h] - base);
      largest[h] = m;
      even = 0, odd = 0;
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
        s[n][2 * h] = exp2Fast(fmaf(s[n][2 * h], multiplier, -base));
        s[n][2 * h + 1] = exp2Fast(fmaf(s[n][2 * h + 1], multiplier, -base));
        even += s[n][2 * h];
        odd += s[n][2 * h + 1];
      }
      total[h] = fmaf(total[h], rescale[h], even + odd);
    }
  }
};

template <class T, int kD, bool groups>
__global__ void __launch_bounds__(kWideThreads, ForwardShape<T, kD, groups>::blocksAtOnce)
    wideForwardKernel(Problem<T> a, Parts parts, T* out, float* logSumExp) {
  using Shape = ForwardShape<T, kD, groups>;
  constexpr int kKeys = Shape::keys, kBlocks = kKeys / 8, kColumns = kD / 8;
  auto& shared = wideShared<typename Shape::Shared>();

  const Pair pair(a, wideHead(a.Hkv), static_cast<int>(blockIdx.y));
  // The last rows, which see most where attention is causal, first.
  const int block = static_cast<int>(gridDim.x) / a.Hkv - 1 - wideBlock(a.Hkv), part = block % parts.count;
  const int r0 = block / parts.count * kWideOwned, r1 = min(r0 + kWideOwned, pair.rows);
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
  const auto copy = [&](T* tile, const T* from, int j0) {
    if (j0 >= last) return;
    copyRows<kKeys, kD>(tile, a.D, from + pair.keyAt(j0), pair.keyStride, last - j0);
  };

  const int r = r0 + 16 * warpIndex() + laneIndex() / 4;
  const Sight sight = Sight::ofRows(pair, r, last);
  // Tiles within see all: from where the last row begins to see, to where the first one ends.
  const int fullFrom = pair.firstSeen(r1 - 1), fullTo = pair.keySegments ? 0 : min(last, pair.lastSeen(r0 + 1));
  Softmax softmax;
  float sums[kColumns][4] = {}, s[kBlocks][4] = {}, rescale[2];
  uint32_t weights[kBlocks / 2][4];
  const auto weigh = [&](int j0) {
    if (a.inverseCap > 0) tanhOfTile(s, a.inverseCap);
    if (j0 < fullFrom || j0 + kKeys > fullTo) {
      sight.template forEachUnseen<kBlocks>(j0, [&](int n, int e) { s[n][e] = -INFINITY; });
    }
    softmax.weigh(s, a.multiplier, rescale);
    if constexpr (groups) beforeWaiting(__float_as_uint(softmax.total[0] + softmax.total[1]), shared.queries);
  };
  const auto meet = [] {
    if constexpr (groups) showToGroups();
    syncBlock();
  };

  int j = nextTile(first), next = j < last ? nextTile(j + kKeys) : last, stage = 0;
  copyRows<kWideOwned, kD>(shared.queries, a.D,
                           [&](int i) { return r0 + i < r1 ? a.q + pair.rowAt(r0 + i) : nullptr; });
  copy(shared.keys[0], a.k, j);
  commitCopies();
  copy(shared.values[0], a.v, j);
  copy(shared.keys[1], a.k, next);
  commitCopies();
  if (j < last) {
    waitForCopies<1>();
    meet();
    beginTransposed<groups, kWideOwned, kD>(s, shared.queries, shared.keys[0]);
    waitForGroups<0>(s);
    weigh(j);
    while (true) {
      waitForGroups<0>(sums);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n][e] *= rescale[e / 2];
      }
      packWeights<T>(weights, s);
      waitForCopies<0>();
      meet();
      if (next >= last) break;
      beginTransposed<groups, kWideOwned, kD>(s, shared.queries, shared.keys[stage ^ 1]);
      beginByWeights<groups, T>(sums, weights, shared.values[stage]);
      const int afterNext = nextTile(next + kKeys);
      copy(shared.keys[stage], a.k, afterNext);
      copy(shared.values[stage ^ 1], a.v, next);
      commitCopies();
      waitForGroups<1>(s);
      weigh(next);
      next = afterNext;
      stage ^= 1;
    }
    beginByWeights<groups, T>(sums, weights, shared.values[stage]);
    waitForGroups<0>(sums);
  }
  waitForCopies<0>();
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = softmax.total[h];
    total += shuffleXor(total, 1);
    total += shuffleXor(total, 2);
    factor[h] = total == 0 ? 0.0f : 1.0f / total;
    const int row = r + 8 * h;
    if (row >= r1) continue;
    if (parts.count > 1) {
      const int64_t pairs = int64_t{gridDim.y} * a.Hkv, index = int64_t{blockIdx.y} * a.Hkv + wideHead(a.Hkv);
      const int64_t at = (part * pairs + index) * pair.rows + row;
      storeRow(parts.out + at * a.D, 0, a.D, sums, h, 1.0f);
      if (laneIndex() % 4 == 0) {
        parts.largest[at] = softmax.largest[h];
        parts.sum[at] = total;
      }
    } else if (laneIndex() % 4 == 0) {
      logSumExp[pair.statisticAt(row)] = total == 0 ? -INFINITY : softmax.largest[h] * kLn2 + logf(total);
    }
  }
  if (parts.count > 1) return;
  storeRows<kD>(shared.queries, a.D, sums, factor,
                [&](int i) { return r0 + i < r1 ? out + pair.rowAt(r0 + i) : nullptr; });
}

}  // namespace

template <class T>
void forwardWide(Context& context, const Problem<T>& a, const Parts& parts, int64_t B, T* out, float* logSumExp) {
  const int64_t blocks = (a.rows() + kWideOwned - 1) / kWideOwned * parts.count;
  dispatchWide(context, a.D, [&](auto size, auto groups) {
    constexpr int kD = decltype(size)::value;
    constexpr bool kGroups = decltype(groups)::value;
    launch(context, wideForwardKernel<T, kD, kGroups>, wideGrid(blocks, a.Hkv, B), kWideThreads,
           wideBytes<typename ForwardShape<T, kD, kGroups>::Shared>, a, parts, out, logSumExp);
  });
}

template void forwardWide(Context&, const Problem<bf16>&, const Parts&, int64_t, bf16*, float*);
template void forwardWide(Context&, const Problem<f16>&, const Parts&, int64_t, f16*, float*);

}  // namespace qlora::cuda::attention
