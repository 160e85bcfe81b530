// The engine in fp32: products fused where the instruction set fuses.
#pragma once

#include "simd/gemm_engine.h"
#if QLORA_NEON
#include "simd/nibble_table_neon.h"
#include "simd/tile_neon.h"
#else
#include "simd/nibble_table.h"
#endif

namespace qlora::QLORA_ISA {

struct Fp32Engine {
  using Element = float;
  static constexpr int kDepth = 1, kGroup = 2 * kVector, kTail = kGroup, kLanesUnit = kGroup, kStrip = 2 * kVector;
  // As many sums as registers hold beside two lanes and a broadcast.
  static constexpr int kRows = kRegisters == 32 ? 12 : (kVector == 8 ? 6 : 4);
  static constexpr int kRowUnit = 1, kChunk = 256, kStride = kChunk + 16, kDecoded = 128;
  // Rows that a decoder asks memory for ahead of their turn.
  static constexpr int kAheadRows = 4, kAheadLanes = 16;
  struct Session {};

  /// Rows [i, i + rows), columns [j, j + n), in split order, `stride` apart.
  static void rowsSplit(const GemmOperand& o, DType compute, int64_t i, int64_t rows, int64_t j, int64_t n, float* out,
                        int64_t stride) {
    if (o.weight && hasVectorGroups(*o.weight)) {
      const Nibbles nibbles(*o.weight);
      return dispatchFloat(compute, [&](auto zero) {
        for (int64_t r = 0; r < rows; ++r) {
          prefetch(nibbles.data + (((i + r + kAheadRows) * nibbles.K + j) >> 1), n / 2);
          forEachVectorGroup<decltype(zero)>(nibbles, i + r, j, n, [&](int64_t c, Vector even, Vector odd) {
            store(out + r * stride + c, even);
            store(out + r * stride + c + kVector, odd);
          });
        }
      });
    }
    for (int64_t r = 0; r < rows; ++r) readSplit<kGroup, kTail, 2, kChunk>(o, compute, i + r, j, n, out + r * stride);
  }

  /// Rows [i, i + rows), columns [j, j + n), in memory's order, `stride` apart.
  static void rowsNatural(const GemmOperand& o, DType compute, int64_t i, int64_t rows, int64_t j, int64_t n,
                          float* out, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) readNatural(o, compute, i + r, j, n, out + r * stride);
  }

  /// A strip from kStrip rows in split order, `stride` apart.
  static void lanesFromRows(const float* rows, int64_t stride, int64_t depth, float* strip) {
    for (int64_t k = 0; k < depth; k += kVector) {
      for (int half = 0; half < 2; ++half) {
        transpose(rows + half * kVector * stride + k, stride, strip + k * kStrip + half * kVector, kStrip);
      }
    }
  }

  /// Strips, kChunk * kStrip apart, of columns [j, j + columns) of rows [i, i + n).
  static void lanes(const GemmOperand& o, DType compute, int64_t i, int64_t n, int64_t j, int64_t columns,
                    float* strips) {
    if (o.weight && hasVectorGroups(*o.weight)) {
      const Nibbles nibbles(*o.weight);
      return dispatchFloat(compute, [&](auto zero) {
        for (int64_t r = 0; r < n; ++r) {
          prefetch(nibbles.data + (((i + r + kAheadLanes) * nibbles.K + j) >> 1), columns / 2);
          forEachVectorGroup<decltype(zero)>(nibbles, i + r, j, columns, [&](int64_t c, Vector even, Vector odd) {
            store(strips + c * kChunk + r * kStrip, even);
            store(strips + c * kChunk + r * kStrip + kVector, odd);
          });
        }
      });
    }
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < columns; c += kStrip) {
        readSplit<kGroup, kTail, 2, kStrip>(o, compute, i + r, j + c, std::min<int64_t>(kStrip, columns - c),
                                            strips + c * kChunk + r * kStrip);
      }
    }
  }

  QLORA_INLINE static void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
  }

  template <int R>
  static void tileOf(int64_t depth, const float* rows, const float* strip, float* c, bool first) {
    // Each chunk is summed by itself: over a long K (a vocabulary) one running sum would swallow small products.
    Vector sum[R][2]{};
#if QLORA_NEON
    multiplyTile<R, kStride>(depth, rows, strip, sum);
#else
    for (int64_t k = 0; k < depth; ++k) {
      const Vector low = load(strip + k * kStrip), high = load(strip + k * kStrip + kVector);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vector x = broadcast(rows[r * kStride + k]);
        sum[r][0] = multiplyAdd(x, low, sum[r][0]);
        sum[r][1] = multiplyAdd(x, high, sum[r][1]);
      }
    }
#endif
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        float* total = c + r * kStrip + v * kVector;
        store(total, first ? sum[r][v] : load(total) + sum[r][v]);
      }
    }
  }

  static void tile(int count, int /*lanes*/, int64_t depth, const float* rows, const float* strip, float* c,
                   bool first) {
    switch (count) {
#define QLORA_TILE(n) \
  case n:             \
    if constexpr (n <= kRows) return tileOf<n>(depth, rows, strip, c, first);
      QLORA_TILE(1)
      QLORA_TILE(2)
      QLORA_TILE(3)
      QLORA_TILE(4)
      QLORA_TILE(5)
      QLORA_TILE(6)
      QLORA_TILE(7)
      QLORA_TILE(8)
      QLORA_TILE(9)
      QLORA_TILE(10)
      QLORA_TILE(11)
      QLORA_TILE(12)
#undef QLORA_TILE
    }
  }
};

}  // namespace qlora::QLORA_ISA
