// Tiles of 16-bit elements in shared memory, as matrix instructions want them.
//
// A tile has rows of `columns` elements, in pieces of 8 (16 bytes). ldmatrix reads eight rows of one piece at once, and
// the 128 bytes that shared memory serves at a time should hold all of them: so the pieces of a row are swapped by a
// number that differs among eight rows (`place`). Copies and decoding write pieces, fragments read them, both by place.
//
// Which elements a lane holds for an mma is in mma.h. An operand whose rows run along the inner dimension is loaded as it
// lies, another transposed: so one form of a weight serves forward and backward.
#pragma once

#include "cuda/mma.h"
#include "cuda/weight.h"

namespace qlora::cuda {

constexpr int kPiece = 8;  // elements

/// Where piece `piece` of row `row` lies, in elements.
template <int columns>
QLORA_HOST_DEVICE int place(int row, int piece) {
  constexpr int pieces = columns / kPiece;
  constexpr int rowsOfLine = pieces >= 8 ? 1 : 8 / pieces;  // of 128 bytes
  return row * columns + ((piece ^ (row / rowsOfLine % (pieces < 8 ? pieces : 8))) * kPiece);
}

/// Begins to copy a tile from a matrix [R, C] in rows of `stride`; zeros beyond its end. C and stride are multiples of
/// 8.
template <int rows, int columns, int threads, class T>
QLORA_DEVICE void copyTile(T* tile, const T* from, int64_t stride, int64_t firstRow, int64_t R, int64_t firstColumn,
                           int64_t C) {
  constexpr int pieces = columns / kPiece;
#pragma unroll
  for (int at = 0; at < rows * pieces; at += threads) {
    const int own = at + static_cast<int>(threadIdx.x), row = own / pieces, piece = own % pieces;
    if (rows * pieces % threads && own >= rows * pieces) break;
    const int64_t r = firstRow + row, c = firstColumn + piece * kPiece;
    const bool valid = r < R && c < C;
    copyAsync16(tile + place<columns>(row, piece), valid ? from + r * stride + c : from, valid);
  }
}

/// Fills a tile from elements of any kind, one by one; zeros beyond [R, C].
template <int rows, int columns, int threads, class T>
QLORA_DEVICE void fillTile(T* tile, const Elements& e, int64_t firstRow, int64_t R, int64_t firstColumn, int64_t C) {
  for (int at = static_cast<int>(threadIdx.x); at < rows * columns; at += threads) {
    const int row = at / columns, column = at % columns;
    const int64_t r = firstRow + row, c = firstColumn + column;
    tile[place<columns>(row, column / kPiece) + column % kPiece] =
        fromFloat<T>(r < R && c < C ? e.at(r, c) : 0.0f);
  }
}

/// The fragment of A, 16 x 16, from row m and column k on. inner: the tile's rows run along k.
template <int columns, bool inner, class T>
QLORA_DEVICE void loadA(uint32_t (&a)[4], const T* tile, int m, int k) {
  const int lane = laneIndex(), i = lane % 8, x = lane / 8 % 2, y = lane / 16;
  if constexpr (inner) {
    loadMatrices<false>(a, tile + place<columns>(m + i + 8 * x, k / kPiece + y));
  } else {
    loadMatrices<true>(a, tile + place<columns>(k + i + 8 * y, m / kPiece + x));
  }
}

/// Two fragments of B, 16 x 8 each, from row k and columns n and n + 8 on: b[0..1] and b[2..3].
template <int columns, bool inner, class T>
QLORA_DEVICE void loadB(uint32_t (&b)[4], const T* tile, int k, int n) {
  const int lane = laneIndex(), i = lane % 8, x = lane / 8 % 2, y = lane / 16;
  if constexpr (inner) {
    loadMatrices<false>(b, tile + place<columns>(n + i + 8 * y, k / kPiece + x));
  } else {
    loadMatrices<true>(b, tile + place<columns>(k + i + 8 * x, n / kPiece + y));
  }
}

}  // namespace qlora::cuda
