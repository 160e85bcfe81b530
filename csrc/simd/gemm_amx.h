// The engine on AMX. Its panels are those of AVX-512 with bf16 (gemm_bf16.h), since they are what tiles want: rows of
// one operand are A as they lie, a strip of lanes in pairs of k is B.
//
//   nt   decoded rows of W are A, X was packed once as B; what is stored is transposed
//   nn   dY was packed once as A, rows n and n + 1 of W are interleaved as they are decoded: B
//
// A product of 32 x 32 sums takes four tiles of C and, for each 32 of k, two of A and two of B: four multiplications of
// 16 cycles for four loads of 16 rows, which take the two load ports 32 cycles. Four tiles of C also hide the 52 cycles
// that a multiplication takes to finish; fewer rows or lanes use fewer. C stays in its tiles for a chunk of K.
//
// Sizes, for 48 KiB of first and 2 MiB of second cache: a chunk is 256 deep, so the 32 rows of A (18 KiB), one strip of
// B (16 KiB) and its C (4 KiB) fit the first; A is used again for each strip, B streams from the second, and is asked
// for two steps ahead, as the C of the next strip is. A block of at most 512 x 512 (fewer where threads have
// rows of their own, gemm_engine.h) has 288 KiB of A, 256 of B, 1 MiB of C; it decodes a weight once for its tokens and
// reads a packed X once for its rows of W. Rows of A are 576 bytes apart, nine
// lines, so the 16 rows of a tile fall into different sets.
//
// Sums: tiles add 32 products at a time to C (tiles.h), so C goes on from chunk to chunk: a running sum over K / 32
// terms.
#pragma once

#include "simd/gemm_bf16.h"
#include "simd/tile_product.h"

namespace qlora::QLORA_ISA {

struct AmxEngine : Bf16Operands<256> {
  static constexpr int kRows = 32, kRowUnit = kTileRows, kDepth = kTileDepth, kDecoded = 512;
  static_assert(kDecoded <= kMostLanes);

  using Session = TileSession;

  /// As Bf16Operands, and zeros up to a whole kDepth of rows.
  static void lanes(const GemmOperand& o, DType compute, int64_t i, int64_t n, int64_t j, int64_t columns,
                    bf16* strips) {
    Bf16Operands::lanes(o, compute, i, n, j, columns, strips);
    const int64_t filled = roundUp(n, 2), padded = roundUp(n, kDepth);
    for (int64_t c = 0; c < columns; c += kStrip) {
      std::fill(strips + c * kChunk + filled * kStrip, strips + c * kChunk + padded * kStrip, bf16{});
    }
  }

  static void tile(int count, int lanes, int64_t depth, const bf16* rows, const bf16* strip, float* c, bool first) {
    const TileProduct product{rows, kStride, strip, depth, c};
    tilesAreEmulated() ? multiplyTiles<EmulatedTiles>(count, lanes, product, first)
                       : multiplyTiles<HardwareTiles>(count, lanes, product, first);
  }
};

static_assert(AmxEngine::kRows * AmxEngine::kStrip == kSumsSize && AmxEngine::kStrip == kTileLanes);

}  // namespace qlora::QLORA_ISA
