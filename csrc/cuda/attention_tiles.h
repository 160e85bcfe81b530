// What attention's kernels are made of (ops/attention_forward.cu, ops/attention_backward.cu).
//
// Rows. The query heads of a key head see the same keys, so they are handled together: of a pair (batch row, key head)
// row r is query r / group of head r % group of its group, and there are Tq x group rows. A key is then read once for
// all heads of the group, decoding has several rows to fill a matrix instruction with, and dk and dv are sums over
// rows.
//
// Tiles. A block owns 16 rows a warp (or keys: the pass of dk and dv), which stay in shared memory, and visits tiles of
// keys (or rows) one after the other. A warp has the products of its 16 with a tile in registers, in the layout of
// mma's C: lane l holds rows g = l / 4 and g + 8, columns t = 2 (l % 4) and t + 1 of each 8. Two products are enough:
//
//   multiplyTransposed   C += A B^T, both from shared memory:  q k^T, dout v^T, and their transposes k q^T, v dout^T
//   multiplyByWeights    C += P B, P from registers:           p v, ds k, p^T dout, ds^T q
//
// C's layout is that of A's fragments, so P need not go through shared memory. 16-bit types use mma, with P rounded to
// that type; f32 uses fmaf in the same layout. Rows of tiles are 16 bytes longer than they need be, which spreads the 8
// rows that ldmatrix reads at once over all banks. Elements beyond the head size, up to the size that the kernel is
// compiled for (dispatchHeadSize), are zero, as are rows beyond the last.
//
// Tiles fit into the 64 KiB that compute capability 7.5 has. Left out: tensor memory and wgmma, warps of different
// roles, dropout.
#pragma once

#include "cuda/device.h"
#include "cuda/mma.h"

namespace qlora::cuda::attention {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

template <class T, int kD>
struct Tiling {
  static constexpr int kRowBytes = kD * static_cast<int>(sizeof(T));
  static constexpr int kStride = kD + kPack<T>;  // elements from a row of a tile to the next
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : kRowBytes <= 512 ? 2 : 1;
  static constexpr int kVisited = kRowBytes <= 256 ? 32 : kRowBytes <= 512 ? 16 : 8;  // with two tensors owned
  static constexpr size_t bytes(int rows) { return sizeof(T) * static_cast<size_t>(rows * kStride); }
};

/// Tensors and rules of a call, for both directions.
template <class T>
struct Problem {
  const T *q, *k, *v;
  const int32_t *querySegments, *keySegments, *pastLength;  // null without
  int Tq, S, H, Hkv, D;
  int causal, window;
  // Scores in units of ln 2: multiplier x, with tanh(inverseCap x) in place of x where inverseCap is not 0.
  float multiplier, inverseCap;

  template <class A>
  static Problem of(const A& a) {
    const auto size = [&](const Tensor& t, int i) { return static_cast<int>(t.dim(i)); };
    const bool caps = a.softCap > 0;
    return {a.q.template data<T>(),
            a.k.template data<T>(),
            a.v.template data<T>(),
            a.querySegments.template dataOrNull<int32_t>(),
            a.keySegments.template dataOrNull<int32_t>(),
            nullptr,
            size(a.q, 1),
            size(a.k, 1),
            size(a.q, 2),
            size(a.k, 2),
            size(a.q, 3),
            a.causal,
            static_cast<int>(std::min<int64_t>(a.window, INT32_MAX / 2)),
            (caps ? a.softCap : a.scale) * kLog2E,
            caps ? a.scale / a.softCap : 0.0f};
  }
  int rows() const { return Tq * (H / Hkv); }
};

/// What the parts of the keys leave in forward: largest (in units of ln 2) and sum [parts, pairs, rows], out [parts,
/// pairs, rows, D]. Null where there is one part.
struct Parts {
  int count, keys;  // how many, of how many keys
  float *largest, *sum, *out;
};

/// What backward needs beside. logSumExp and delta are of the rows of each pair, in the order of rows, [pairs, stride]:
/// in units of ln 2, and +infinity where a row sees nothing or is none, so that its weights are 0; dot(dout, out).
template <class T>
struct Gradients {
  const T* dout;
  const float *logSumExp, *delta;
  int64_t stride;
  T *dq, *dk, *dv;
  float scale;
};

/// Calls f with the padded head size as a type. f32, which is seldom used, has fewer of them.
template <class T, class F>
void dispatchHeadSize(const char* op, int64_t D, F&& f) {
  if (D <= 64) return f(std::integral_constant<int, 64>{});
  if constexpr (sizeof(T) == 2) {
    if (D <= 80) return f(std::integral_constant<int, 80>{});
    if (D <= 96) return f(std::integral_constant<int, 96>{});
  }
  if (D <= 128) return f(std::integral_constant<int, 128>{});
  if (D <= 256) return f(std::integral_constant<int, 256>{});
  fail("ERR_QLORA_SHAPE", "%s: on CUDA a head has at most 256 elements, got %lld", op, static_cast<long long>(D));
}

/// What a query is, as far as seeing goes.
struct Seer {
  int position, segment;
};

/// A batch row and a key head: which keys its rows see, and where things lie.
struct Pair {
  int D, Tq, group, rows, keyLength;
  int causal, window;
  const int32_t *querySegments, *keySegments;  // of the batch row; null without
  int64_t firstQuery, queryStride, firstKey, keyStride, firstHead;

  template <class T>
  QLORA_DEVICE Pair(const Problem<T>& a, int head, int b)
      : D(a.D),
        Tq(a.Tq),
        group(a.H / a.Hkv),
        rows(a.Tq * group),
        keyLength(a.pastLength ? min(max(a.pastLength[b], 0) + a.Tq, a.S) : a.S),
        causal(a.causal),
        window(a.window),
        querySegments(a.querySegments ? a.querySegments + int64_t{b} * a.Tq : nullptr),
        keySegments(a.keySegments ? a.keySegments + int64_t{b} * a.S : nullptr),
        firstQuery((int64_t{b} * a.Tq * a.H + head * group) * a.D),
        queryStride(int64_t{a.H} * a.D),
        firstKey((int64_t{b} * a.S * a.Hkv + head) * a.D),
        keyStride(int64_t{a.Hkv} * a.D),
        firstHead(int64_t{b} * a.H + head * group) {}

  /// Where a row begins in q and the like, a key in k and the like, and a row's element in logSumExp [B, H, Tq].
  QLORA_DEVICE int64_t rowAt(int row) const { return firstQuery + row / group * queryStride + row % group * D; }
  QLORA_DEVICE int64_t keyAt(int key) const { return firstKey + key * keyStride; }
  QLORA_DEVICE int64_t statisticAt(int row) const { return (firstHead + row % group) * Tq + row / group; }

  QLORA_DEVICE int position(int row) const { return keyLength - Tq + row / group; }
  QLORA_DEVICE Seer seer(int row) const {
    return {position(row), querySegments && row < rows ? querySegments[row / group] : 0};
  }
  QLORA_DEVICE bool sees(const Seer& query, int key) const {
    if (key >= keyLength || (causal && key > query.position)) return false;
    if (window && key <= query.position - window) return false;
    return !keySegments || (query.segment >= 0 && query.segment == keySegments[key]);
  }
  /// Whether every row of [r0, r1) sees every key of [j0, j1).
  QLORA_DEVICE bool seesAll(int r0, int r1, int j0, int j1) const {
    if (keySegments || j1 > keyLength || r1 > rows) return false;
    if (causal && j1 - 1 > position(r0)) return false;
    return !(window && j0 <= position(r1 - 1) - window);
  }
  /// By position, rows [r0, r1) see keys within [firstSeen, lastSeen); keys [j0, j1) are seen by [firstRow, lastRow).
  QLORA_DEVICE int firstSeen(int r0) const { return window ? max(0, position(r0) - window + 1) : 0; }
  QLORA_DEVICE int lastSeen(int r1) const { return causal ? min(keyLength, position(r1 - 1) + 1) : keyLength; }
  QLORA_DEVICE int firstRow(int j0) const { return causal ? max(0, j0 - (keyLength - Tq)) * group : 0; }
  QLORA_DEVICE int lastRow(int j1) const {
    return window ? min(Tq, max(0, j1 - 1 + window - (keyLength - Tq))) * group : rows;
  }
};

/// The ids of some queries or keys lie within these.
struct Segments {
  int low, high;
  QLORA_DEVICE bool meet(const Segments& other) const {
    return high >= 0 && other.high >= 0 && low <= other.high && other.low <= high;
  }
};

/// Of ids[first / group] to ids[(last - 1) / group]. By a whole warp.
QLORA_DEVICE Segments segmentsOf(const int32_t* ids, int first, int last, int group) {
  int low = INT32_MAX, high = INT32_MIN;
  for (int i = first + laneIndex(); i < last; i += kWarpSize) {
    low = min(low, ids[i / group]);
    high = max(high, ids[i / group]);
  }
  return {-warpReduce(-low, Largest{}), warpReduce(high, Largest{})};
}

/// Loads a tile: row r from at(r), zeros where that is null, by all threads of the block. waitForCopies() is left.
template <class T, int kD, int kRows, class At>
QLORA_DEVICE void loadTile(T* tile, int D, At&& at) {
  constexpr int kStride = Tiling<T, kD>::kStride, kPacks = kD / kPack<T>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (D % kPack<T> == 0) {
    for (int p = thread; p < kRows * kPacks; p += threads) {
      const int r = p / kPacks, d = p % kPacks * kPack<T>;
      const T* from = at(r);
      copyAsync16(tile + r * kStride + d, from + d, from != nullptr && d < D);
    }
  } else {
    for (int e = thread; e < kRows * kD; e += threads) {
      const int r = e / kD, d = e % kD;
      const T* from = at(r);
      tile[r * kStride + d] = from != nullptr && d < D ? from[d] : T{};
    }
  }
}

/// c += A B^T: 16 rows of A, 8 kTiles of B.
template <class T, int kD, int kTiles>
QLORA_DEVICE void multiplyTransposed(float (&c)[kTiles][4], const T* a, const T* b) {
  constexpr int kStride = Tiling<T, kD>::kStride;
  const int lane = laneIndex();
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = 2 * (lane % 4);
#pragma unroll 1
    for (int k = 0; k < kD; k += 4) {
      const auto upper = loadPack<4>(a + g * kStride + k), lower = loadPack<4>(a + (g + 8) * kStride + k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto column = loadPack<4>(b + (8 * n + t + h) * kStride + k);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            c[n][h] = fmaf(upper.value[e], column.value[e], c[n][h]);
            c[n][2 + h] = fmaf(lower.value[e], column.value[e], c[n][2 + h]);
          }
        }
      }
    }
  } else {
    const T* aRow = a + lane % 16 * kStride + lane / 16 * 8;
    const T* bRow = b + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < kD; k += 16) {
      uint32_t af[4], bf[4];
      loadMatrices<false>(af, aRow + k);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        loadMatrices<false>(bf, bRow + 8 * n * kStride + k);
        mma<T>(c[n], af, {bf[0], bf[1]});
        mma<T>(c[n + 1], af, {bf[2], bf[3]});
      }
    }
  }
}

/// c += P B: P 16 x 8 kTiles, B 8 kTiles rows, of which 8 kColumns columns from b on.
template <class T, int kD, int kTiles, int kColumns>
QLORA_DEVICE void multiplyByWeights(float (&c)[kColumns][4], const float (&p)[kTiles][4], const T* b) {
  constexpr int kStride = Tiling<T, kD>::kStride;
  const int lane = laneIndex();
  if constexpr (sizeof(T) == 4) {
    const int t = 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        const int holder = lane / 4 * 4 + j / 2;
        const float upper = shuffle(j % 2 ? p[n][1] : p[n][0], holder);
        const float lower = shuffle(j % 2 ? p[n][3] : p[n][2], holder);
        const T* row = b + (8 * n + j) * kStride + t;
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
          const auto pair = loadPack<2>(row + 8 * m);
          c[m][0] = fmaf(upper, pair.value[0], c[m][0]);
          c[m][1] = fmaf(upper, pair.value[1], c[m][1]);
          c[m][2] = fmaf(lower, pair.value[0], c[m][2]);
          c[m][3] = fmaf(lower, pair.value[1], c[m][3]);
        }
      }
    }
  } else {
    const T* bRow = b + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const uint32_t pf[4] = {packWord<T>(p[n][0], p[n][1]), packWord<T>(p[n][2], p[n][3]),
                              packWord<T>(p[n + 1][0], p[n + 1][1]), packWord<T>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
      for (int m = 0; m < kColumns; m += 2) {
        uint32_t bf[4];
        loadMatrices<true>(bf, bRow + 8 * n * kStride + 8 * m);
        mma<T>(c[m], pf, {bf[0], bf[1]});
        mma<T>(c[m + 1], pf, {bf[2], bf[3]});
      }
    }
  }
}

#if defined(__CUDACC__)
#define QLORA_OUT_OF_LINE inline __device__ __noinline__
#else
#define QLORA_OUT_OF_LINE inline
#endif

/// Out of line, since kernels have dozens of scores in registers, most of whose models have no soft cap.
QLORA_OUT_OF_LINE float4 tanhOfFour(float4 x) { return make_float4(tanhf(x.x), tanhf(x.y), tanhf(x.z), tanhf(x.w)); }

/// x = tanh(factor x).
template <int kTiles>
QLORA_DEVICE void tanhOfTile(float (&x)[kTiles][4], float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float4 y = tanhOfFour(make_float4(factor * x[n][0], factor * x[n][1], factor * x[n][2], factor * x[n][3]));
    x[n][0] = y.x, x[n][1] = y.y, x[n][2] = y.z, x[n][3] = y.w;
  }
}

/// Stores factor x the columns from `first` on that a head has, of a row whose values are c[.][2 half] and [.. + 1].
template <class T, int kColumns>
QLORA_DEVICE void storeRow(T* to, int first, int D, const float (&c)[kColumns][4], int half, float factor) {
  const int t = 2 * (laneIndex() % 4);
#pragma unroll
  for (int m = 0; m < kColumns; ++m) {
    const int d = first + 8 * m + t;
    const T low = fromFloat<T>(c[m][2 * half] * factor), high = fromFloat<T>(c[m][2 * half + 1] * factor);
    if (D % 2 == 0 && d < D) {
      storePack<2>(to + d, Pack<T, 2>{{low, high}});
    } else {
      if (d < D) to[d] = low;
      if (d + 1 < D) to[d + 1] = high;
    }
  }
}

}  // namespace qlora::cuda::attention
