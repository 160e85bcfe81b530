// The product of a matmul on tiles: up to 32 x 32 sums, in four tiles of C. gemm_amx.h says where the operands come
// from.
#pragma once

#include "core/wanted_isa.h"
#include "simd/tiles.h"

namespace qlora::QLORA_ISA {

constexpr int kTileDepth = kTileBytes / 2;  // bf16 in a row of A
constexpr int kTileLanes = 2 * kTileRows;   // of a strip
constexpr int kSumsSize = kTileLanes * kTileLanes;

struct TileProduct {
  const bf16* rows;  // A: 16 R rows, rowStride apart
  int64_t rowStride;
  const bf16* strip;  // B: [depth / 2][kTileLanes][2], of which the first 16 L lanes are multiplied
  int64_t depth;      // a multiple of kTileDepth
  float* sums;        // C: 16 R rows of kTileLanes, of which the first 16 L are written
};

/// While a thread has one of these, its tiles are on.
class TileSession {
 public:
  TileSession() {
    if (!tilesAreEmulated()) HardwareTiles::configure();
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
  ~TileSession() {
    if (!tilesAreEmulated()) HardwareTiles::release();
  }
};

/// Calls f<number>(place) for each tile of C, whose rows lie `stride` apart.
template <int R, int L, class F>
QLORA_INLINE void forEachSum(float* sums, int64_t stride, F&& f) {
  f.template operator()<0>(sums);
  if constexpr (L == 2) f.template operator()<1>(sums + kTileRows);
  if constexpr (R == 2) f.template operator()<2>(sums + kTileRows * stride);
  if constexpr (R == 2 && L == 2) f.template operator()<3>(sums + kTileRows * stride + kTileRows);
}

/// C = A B where it is the first product of C, else C += A B.
template <int R, int L, class Tiles>
void multiplyTiles(Tiles& tiles, const TileProduct& p, bool first) {
  constexpr int64_t kSumRow = kTileLanes * sizeof(float), kStripRow = kTileLanes * 2 * sizeof(bf16);
  constexpr int kStep = kTileDepth * kTileLanes, kAheadSteps = 2, kLine = 64;
  constexpr int kSumsAhead = kSumsSize * 4 / kLine / 8;  // lines a step: all of the next sums in a chunk of 8 steps
  const int64_t rowBytes = p.rowStride * static_cast<int64_t>(sizeof(bf16));
  if (first) {
    forEachSum<R, L>(p.sums, kTileLanes, [&]<int C>(float*) { tiles.template zero<C>(); });
  } else {
    forEachSum<R, L>(p.sums, kTileLanes, [&]<int C>(float* at) { tiles.template load<C>(at, kSumRow); });
  }
  const bf16 *rows = p.rows, *lowerRows = rows + kTileRows * p.rowStride, *strip = p.strip;
  const auto* nextSums = reinterpret_cast<const char*>(p.sums + kSumsSize);
  for (int64_t k = 0; k < p.depth; k += kTileDepth, rows += kTileDepth, lowerRows += kTileDepth, strip += kStep) {
    // What is asked for beyond the end of a buffer does no harm.
    const auto* nextStrip = reinterpret_cast<const char*>(strip + kAheadSteps * kStep);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      __builtin_prefetch(nextStrip + i * kStripRow);
      if constexpr (L == 2) __builtin_prefetch(nextStrip + i * kStripRow + kLine);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSumsAhead; ++i, nextSums += kLine) __builtin_prefetch(nextSums);
    tiles.template load<4>(rows, rowBytes);
    tiles.template load<6>(strip, kStripRow);
    tiles.template multiplyAdd<0, 4, 6>();
    if constexpr (L == 2) {
      tiles.template load<7>(strip + kTileLanes, kStripRow);
      tiles.template multiplyAdd<1, 4, 7>();
    }
    if constexpr (R == 2) {
      tiles.template load<5>(lowerRows, rowBytes);
      tiles.template multiplyAdd<2, 5, 6>();
    }
    if constexpr (R == 2 && L == 2) tiles.template multiplyAdd<3, 5, 7>();
  }
  forEachSum<R, L>(p.sums, kTileLanes, [&]<int C>(float* at) { tiles.template store<C>(at, kSumRow); });
}

/// The same for 1 to 32 rows and lanes: in as few tiles as hold them.
template <class Tiles>
void multiplyTiles(int rows, int lanes, const TileProduct& p, bool first) {
  Tiles tiles;
  if (rows > kTileRows) {
    lanes > kTileRows ? multiplyTiles<2, 2>(tiles, p, first) : multiplyTiles<2, 1>(tiles, p, first);
  } else {
    lanes > kTileRows ? multiplyTiles<1, 2>(tiles, p, first) : multiplyTiles<1, 1>(tiles, p, first);
  }
}

}  // namespace qlora::QLORA_ISA
