// The products of attention: C[rows, lanes] (+)= A[rows, K] B[K, lanes], with A broadcast and B in vectors.
//
// Operands are packed into 32-bit elements: an fp32 value, or a pair of bf16 values that lie next to each other along
// K, so one loop serves both. Three packings of a block X [n, D] (or of scores) are all that is needed; k counts
// elements:
//
//   broadcast, K along a row:     (row, k)  at  [k / 16][n][16], so that a tile's rows are constant offsets apart
//   broadcast, K along a column:  (row, k)  at  [row / kPanel][k][kPanel]
//   vectors:                      (k, lane) at  [lane / kPanel][k][kPanel]
#pragma once

#include <algorithm>
#include <cstring>

#include "ops/attention_vector.h"
#if QLORA_ISA_neonbf16
#include "ops/attention_pairs_neon.h"
#endif

namespace qlora::QLORA_ISA::attention {

constexpr int kPanel = 2 * kWidth;          // lanes of a tile
constexpr int kPanels = 4;                  // of queries in a block
constexpr int kQueries = kPanels * kPanel;  // a block of queries
constexpr int kKeys = 128;                  // a block of keys
constexpr int kChunk = 16;

QLORA_INLINE int64_t divideUp(int64_t n, int64_t by) { return (n + by - 1) / by; }
QLORA_INLINE int64_t roundUp(int64_t n, int64_t to) { return divideUp(n, to) * to; }

/// Elements are fp32 values.
struct Float32 {
  using Element = float;
  using Lanes = Vec;
  static constexpr bool kOnTiles = false;
  struct Session {};  // what a thread holds while it multiplies
  static constexpr int kPack = 1;

  template <class T>
  QLORA_INLINE static Element element(T first, T) {
    return toFloat(first);
  }
  QLORA_INLINE static Lanes lanes(const Element* p) { return load(p); }
  QLORA_INLINE static Lanes broadcast(const Element* p) { return splat(*p); }
  QLORA_INLINE static Vec multiplyAdd(Lanes a, Lanes b, Vec c) { return attention::multiplyAdd(a, b, c); }

  /// One row of scores for two vectors of queries: elements along the queries.
  QLORA_INLINE static void storeAlongLanes(Element* p, Vec a, Vec b) {
    store(p, a);
    store(p + kWidth, b);
  }
  /// kPack rows of scores, one vector of queries: elements along the keys.
  QLORA_INLINE static void storeAlongRows(Element* p, const Vec* rows) { store(p, rows[0]); }
};

#if defined(QLORA_ISA_avx512bf16)
/// Elements are pairs of bf16 values. The products are summed in fp32.
struct BFloat16Pairs {
  using Element = uint32_t;
  using Lanes = __m512bh;
  static constexpr bool kOnTiles = false;
  struct Session {};
  static constexpr int kPack = 2;

  QLORA_INLINE static Element element(bf16 first, bf16 second) {
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
  }
  QLORA_INLINE static Lanes lanes(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
  QLORA_INLINE static Lanes broadcast(const Element* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }
  QLORA_INLINE static Vec multiplyAdd(Lanes a, Lanes b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
  QLORA_INLINE static void storeAlongLanes(Element* p, Vec a, Vec b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  QLORA_INLINE static void storeAlongRows(Element* p, const Vec* rows) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(
        p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0])));
  }
};
#endif

enum class Sum { overwrite, add };

/// Where a broadcast operand lies: K along its rows in chunks, or along its columns.
template <class Element>
struct AlongRow {
  const Element* data;
  int64_t chunkStride;
  static constexpr int kRowStride = kChunk, kStep = 1;
};
template <class Element>
struct AlongColumn {
  const Element* data;
  static constexpr int kRowStride = 1, kStep = kPanel;
};

template <class Math, int R, int V, int kRowStride, int kStep>
QLORA_INLINE void accumulate(const typename Math::Element* a, const typename Math::Element* b, int64_t K,
                             Vec (&sum)[R][V]) {
  for (int64_t k = 0; k < K; ++k) {
    typename Math::Lanes lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = Math::lanes(b + k * kPanel + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const typename Math::Lanes x = Math::broadcast(a + r * kRowStride + k * kStep);
      for (int v = 0; v < V; ++v) sum[r][v] = Math::multiplyAdd(x, lanes[v], sum[r][v]);
    }
  }
}

template <class Math, int R, int V, class A>
__attribute__((noinline)) void tile(A a, const typename Math::Element* b, int64_t K, float* c, int64_t cStride,
                                    Sum mode) {
  Vec sum[R][V] = {};
  if (mode == Sum::add) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sum[r][v] = load(c + r * cStride + v * kWidth);
    }
  }
  if constexpr (A::kStep == 1) {
    const typename Math::Element* chunk = a.data;
    for (; K >= kChunk; K -= kChunk, chunk += a.chunkStride, b += kChunk * kPanel) {
      accumulate<Math, R, V, A::kRowStride, A::kStep>(chunk, b, kChunk, sum);
    }
    accumulate<Math, R, V, A::kRowStride, A::kStep>(chunk, b, K, sum);
  } else {
    accumulate<Math, R, V, A::kRowStride, A::kStep>(a.data, b, K, sum);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c + r * cStride + v * kWidth, sum[r][v]);
  }
}

template <class Math, int R, int V, class A>
QLORA_INLINE void tileOfRows(int64_t rows, A a, const typename Math::Element* b, int64_t K, float* c, int64_t cStride,
                             Sum mode) {
  if constexpr (R > 0) {
    if (rows == R) return tile<Math, R, V>(a, b, K, c, cStride, mode);
    return tileOfRows<Math, R - 1, V>(rows, a, b, K, c, cStride, mode);
  }
}

/// C[rows, lanes] (+)= A B for up to kPanel lanes; rows are split evenly into tiles of at most kRows.
template <class Math, class A>
  requires(!Math::kOnTiles)
QLORA_INLINE void multiply(int64_t rows, int64_t lanes, A a, const typename Math::Element* b, int64_t K, float* c,
                           int64_t cStride, Sum mode) {
  const int64_t tiles = divideUp(rows, kRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r0 = rows * t / tiles, n = rows * (t + 1) / tiles - r0;
    A at = a;
    at.data += r0 * A::kRowStride;
    if (lanes > kWidth) {
      tileOfRows<Math, kRows, 2>(n, at, b, K, c + r0 * cStride, cStride, mode);
    } else {
      tileOfRows<Math, kRows, 1>(n, at, b, K, c + r0 * cStride, cStride, mode);
    }
  }
}

/// X [rows, D], rows `stride` apart, for broadcasting along D: elements [divideUp(D, kPack) / 16][capacity][16].
template <class Math, class T>
void packAlongRow(const T* x, int64_t stride, int64_t rows, int64_t D, int64_t capacity, typename Math::Element* to) {
  const int64_t K = divideUp(D, Math::kPack);
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + r * stride + k0 * Math::kPack;
      typename Math::Element* row = to + (k0 / kChunk * capacity + r) * kChunk;
      const int64_t left = D - k0 * Math::kPack;
      if (left >= kChunk * Math::kPack) {
        for (int k = 0; k < kChunk; ++k) row[k] = Math::element(from[k * Math::kPack], from[(k + 1) * Math::kPack - 1]);
      } else {
        for (int64_t d = 0; d < left; d += Math::kPack) {
          row[d / Math::kPack] = Math::element(from[d], d + Math::kPack <= left ? from[d + Math::kPack - 1] : T{});
        }
      }
    }
  }
}

/// X [rows, D] as vectors of rows: elements [kPanels][divideUp(D, kPack)][kPanel], zero beyond `rows`.
template <class Math, class T>
void packLanesOfRows(const T* x, int64_t stride, int64_t rows, int64_t D, typename Math::Element* to) {
  const int64_t K = divideUp(D, Math::kPack);
  for (int64_t r0 = 0; r0 < rows; r0 += kPanel) {
    typename Math::Element* panel = to + r0 * K;
    const int64_t lanes = std::min<int64_t>(kPanel, rows - r0);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const T* from = x + (r0 + lane) * stride;
      const int64_t whole = D / Math::kPack;
      for (int64_t k = 0; k < whole; ++k) {
        panel[k * kPanel + lane] = Math::element(from[k * Math::kPack], from[(k + 1) * Math::kPack - 1]);
      }
      if (whole < K) panel[whole * kPanel + lane] = Math::element(from[whole * Math::kPack], T{});
    }
    for (int64_t k = 0; lanes < kPanel && k < K; ++k) {
      for (int64_t lane = lanes; lane < kPanel; ++lane) panel[k * kPanel + lane] = typename Math::Element{};
    }
  }
}

/// X [rows, D] as vectors along D, K along its rows: elements [divideUp(D, kPanel)][capacity / kPack][kPanel], zero
/// beyond D, and beyond `rows` up to an element's end.
template <class Math, class T>
void packLanesOfColumns(const T* x, int64_t stride, int64_t rows, int64_t D, int64_t capacity,
                        typename Math::Element* to) {
  const int64_t K = divideUp(rows, Math::kPack), panelStride = capacity / Math::kPack * kPanel;
  for (int64_t d0 = 0; d0 < D; d0 += kPanel) {
    typename Math::Element* panel = to + d0 / kPanel * panelStride;
    const int64_t lanes = std::min<int64_t>(kPanel, D - d0);
    for (int64_t k = 0; k < K; ++k) {
      const T* first = x + k * Math::kPack * stride + d0;
      const bool whole = (k + 1) * Math::kPack <= rows;
      const T* second = whole ? first + (Math::kPack - 1) * stride : first;
      typename Math::Element* row = panel + k * kPanel;
      if (lanes == kPanel && whole) {
        for (int lane = 0; lane < kPanel; ++lane) row[lane] = Math::element(first[lane], second[lane]);
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane) row[lane] = Math::element(first[lane], whole ? second[lane] : T{});
        for (int64_t lane = lanes; lane < kPanel; ++lane) row[lane] = typename Math::Element{};
      }
    }
  }
}

}  // namespace qlora::QLORA_ISA::attention
