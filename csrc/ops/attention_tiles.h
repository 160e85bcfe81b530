// The products of attention on AMX's tiles. Two of the three packings are tiles as they lie: 16 pairs of a row along K
// are a row of A, vectors are B. What is packed along columns is transposed on its way into A, 16 x 16 pairs at a time.
// Ends of rows and of K go through copies filled up with zeros.
#pragma once

#include "ops/attention_product.h"
#include "simd/tile_product.h"
#include "simd/vector.h"

namespace qlora::QLORA_ISA::attention {

constexpr int kPairs = kTileBytes / sizeof(uint32_t);  // in a row of A; rows of B
static_assert(kPairs == kChunk && kPanel == kTileLanes);

/// Elements are pairs of bf16 values, multiplied by tiles.
struct TilePairs : BFloat16Pairs {
  static constexpr bool kOnTiles = true;
  using Session = TileSession;
};

using PairsOfRows = uint32_t[kTileRows][kPairs];

/// Pairs [k, k + pairs) of up to 16 rows from `row`, as a tile of A.
template <int T, class Tiles>
QLORA_INLINE void loadRows(Tiles& tiles, const AlongRow<uint32_t>& a, int64_t row, int64_t rows, int64_t k,
                           int64_t pairs, PairsOfRows& copy) {
  const uint32_t* from = a.data + k / kChunk * a.chunkStride + row * kChunk;
  if (rows >= kTileRows && pairs == kPairs) return tiles.template load<T>(from, kTileBytes);
  std::memset(copy, 0, sizeof copy);
  for (int64_t r = 0; r < std::min<int64_t>(rows, kTileRows); ++r) {
    std::memcpy(copy[r], from + r * kChunk, static_cast<size_t>(pairs) * sizeof(uint32_t));
  }
  tiles.template load<T>(copy, kTileBytes);
}
template <int T, class Tiles>
QLORA_INLINE void loadRows(Tiles& tiles, const AlongColumn<uint32_t>& a, int64_t row, int64_t, int64_t k, int64_t pairs,
                           PairsOfRows& copy) {
  // A panel has all of its rows; those of K end with the others.
  const uint32_t* from = a.data + k * kPanel + row;
  if (pairs == kPairs) {
    transpose(reinterpret_cast<const float*>(from), kPanel, reinterpret_cast<float*>(copy), kPairs);
  } else {
    std::memset(copy, 0, sizeof copy);
    for (int64_t p = 0; p < pairs; ++p) {
      for (int r = 0; r < kTileRows; ++r) copy[r][p] = from[p * kPanel + r];
    }
  }
  tiles.template load<T>(copy, kTileBytes);
}

/// Up to 16 R rows by 16 L lanes of C.
template <class Tiles, int R, int L, class A>
void multiplyTiles(int64_t rows, const A& a, const uint32_t* b, int64_t K, float* c, int64_t cStride, Sum mode) {
  alignas(64) float partial[2 * kTileRows * kTileLanes];
  const bool isWhole = rows == R * kTileRows;
  float* sums = isWhole ? c : partial;
  const int64_t stride = isWhole ? cStride : kTileLanes, rowBytes = stride * static_cast<int64_t>(sizeof(float));
  const auto eachRow = [&](auto&& copy) {
    for (int64_t r = 0; !isWhole && r < rows; ++r) copy(partial + r * kTileLanes, c + r * cStride);
  };
  constexpr size_t kCopied = L * kTileRows * sizeof(float);
  Tiles tiles;
  if (mode == Sum::add) {
    eachRow([](float* own, const float* theirs) { std::memcpy(own, theirs, kCopied); });
    forEachSum<R, L>(sums, stride, [&]<int C>(float* at) { tiles.template load<C>(at, rowBytes); });
  } else {
    forEachSum<R, L>(sums, stride, [&]<int C>(float*) { tiles.template zero<C>(); });
  }
  constexpr int64_t kLanesRow = kPanel * sizeof(uint32_t);
  alignas(64) PairsOfRows upper, lower;
  alignas(64) uint32_t lanes[kPairs][kPanel];
  for (int64_t k = 0; k < K; k += kPairs) {
    const int64_t pairs = std::min<int64_t>(kPairs, K - k);
    const uint32_t* strip = b + k * kPanel;
    if (pairs < kPairs) {
      std::memset(lanes, 0, sizeof lanes);
      std::memcpy(lanes, strip, static_cast<size_t>(pairs) * kLanesRow);
      strip = lanes[0];
    }
    loadRows<4>(tiles, a, 0, rows, k, pairs, upper);
    tiles.template load<6>(strip, kLanesRow);
    tiles.template multiplyAdd<0, 4, 6>();
    if constexpr (L == 2) {
      tiles.template load<7>(strip + kTileRows, kLanesRow);
      tiles.template multiplyAdd<1, 4, 7>();
    }
    if constexpr (R == 2) {
      loadRows<5>(tiles, a, kTileRows, rows - kTileRows, k, pairs, lower);
      tiles.template multiplyAdd<2, 5, 6>();
    }
    if constexpr (R == 2 && L == 2) tiles.template multiplyAdd<3, 5, 7>();
  }
  forEachSum<R, L>(sums, stride, [&]<int C>(float* at) { tiles.template store<C>(at, rowBytes); });
  eachRow([](const float* own, float* theirs) { std::memcpy(theirs, own, kCopied); });
}

template <class Tiles, class A>
void multiplyTiles(int64_t rows, int64_t lanes, const A& a, const uint32_t* b, int64_t K, float* c, int64_t cStride,
                   Sum mode) {
  if (rows > kTileRows) {
    lanes > kTileRows ? multiplyTiles<Tiles, 2, 2>(rows, a, b, K, c, cStride, mode)
                      : multiplyTiles<Tiles, 2, 1>(rows, a, b, K, c, cStride, mode);
  } else {
    lanes > kTileRows ? multiplyTiles<Tiles, 1, 2>(rows, a, b, K, c, cStride, mode)
                      : multiplyTiles<Tiles, 1, 1>(rows, a, b, K, c, cStride, mode);
  }
}

/// C[rows, lanes] (+)= A B for up to kPanel lanes, whose rows in C and B are whole panels.
template <class Math, class A>
requires std::is_same_v<Math, TilePairs>
void multiply(int64_t rows, int64_t lanes, A a, const typename Math::Element* b, int64_t K, float* c, int64_t cStride,
              Sum mode) {
  for (int64_t r0 = 0; r0 < rows; r0 += 2 * kTileRows) {
    A at = a;
    at.data += r0 * A::kRowStride;
    const int64_t n = std::min<int64_t>(2 * kTileRows, rows - r0);
    float* to = c + r0 * cStride;
    tilesAreEmulated() ? multiplyTiles<EmulatedTiles>(n, lanes, at, b, K, to, cStride, mode)
                       : multiplyTiles<HardwareTiles>(n, lanes, at, b, K, to, cStride, mode);
  }
}

}  // namespace qlora::QLORA_ISA::attention
