// Work over many fp32 tensors at once (all parameters, all gradients): cut into pieces whose bounds depend on the sizes
// alone, so that sums over them, added piece by piece, have the same bits whatever the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

// A multiple of every block size of block-quantized optimizer state.
constexpr int64_t kPiece = 32768;

struct Piece {
  int64_t tensor, begin, count;
};

struct Pieces {
  const Piece* data;
  int64_t count;
};

QLORA_INLINE Pieces cutIntoPieces(Context& context, const std::vector<Tensor>& tensors) {
  const int64_t n = static_cast<int64_t>(tensors.size());
  int64_t count = 0;
  for (int64_t t = 0; t < n; ++t) count += (tensors[t].size() + kPiece - 1) / kPiece;
  Piece* pieces = context.scratch.take<Piece>(count);
  Piece* next = pieces;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t size = tensors[t].size();
    for (int64_t begin = 0; begin < size; begin += kPiece) *next++ = {t, begin, std::min(kPiece, size - begin)};
  }
  return {pieces, count};
}

}  // namespace qlora
