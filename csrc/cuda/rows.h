// Rows of a matrix, a block each, in packs where the length of a row allows it.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace qlora {

/// Blocks for that many rows; each goes on to the row gridDim.x further.
inline int64_t rowBlocks(int64_t rows) { return std::min<int64_t>(rows, 65536); }

/// Calls f(first column) for packs of `count` of a row's D columns, those of this thread.
template <int count, class F>
QLORA_DEVICE void forPacks(int64_t D, F&& f) {
  for (int64_t d = int64_t{threadIdx.x} * count; d < D; d += int64_t{blockDim.x} * count) f(d);
}

/// Calls f with `wide` as a type where every row of D elements begins at a multiple of so many, else with 1.
template <int wide, class F>
void dispatchPack(int64_t D, F&& f) {
  if (D % wide == 0) return f(std::integral_constant<int, wide>{});
  f(std::integral_constant<int, 1>{});
}

namespace detail {

template <class Word>
__global__ void copyRowsKernel(int64_t rows, int64_t words, const Word* from, const int32_t* fromRow, Word* to,
                               const int32_t* toRow) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const Word* source = from + (fromRow ? fromRow[i] : i) * words;
    Word* target = to + (toRow ? toRow[i] : i) * words;
    for (int64_t w = threadIdx.x; w < words; w += blockDim.x) target[w] = source[w];
  }
}

}  // namespace detail

/// to[toRow[i]] = from[fromRow[i]] for rows of `bytes` bytes, an even number. A null list stands for i itself.
inline void copyRows(const Context& context, int64_t rows, int64_t bytes, const void* from, const int32_t* fromRow,
                     void* to, const int32_t* toRow) {
  const auto copy = [&](auto word) {
    using Word = decltype(word);
    launch(context, detail::copyRowsKernel<Word>, rowBlocks(rows), kThreads, 0, rows,
           bytes / static_cast<int64_t>(sizeof(Word)), static_cast<const Word*>(from), fromRow, static_cast<Word*>(to),
           toRow);
  };
  if (bytes % 16 == 0) return copy(uint4{});
  copy(uint16_t{});
}

}  // namespace qlora
