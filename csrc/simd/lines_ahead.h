// Asking memory for what will be decoded next, a few lines at a time while something else is multiplied: a decoder that
// meets its rows in the second cache need not wait for them.
#pragma once

#include "simd/gemm.h"

namespace qlora::QLORA_ISA {

/// The cache lines of a block of a dense operand, row by row; none of a weight of 4 or 8 bits.
class LinesAhead {
 public:
  LinesAhead() = default;
  /// Rows [i, i + rows), columns [j, j + columns).
  LinesAhead(const GemmOperand& o, int64_t i, int64_t rows, int64_t j, int64_t columns) {
    const DType dtype = o.weight ? o.weight->data.dtype : o.dtype;
    if (dtype == DType::u8 || dtype == DType::i8) return;
    const auto size = static_cast<int64_t>(sizeOf(dtype));
    stride_ = (o.weight ? o.weight->K : o.stride) * size;
    bytes_ = columns * size;
    rows_ = rows;
    row_ = static_cast<const char*>(o.weight ? o.weight->data.data<void>() : o.data) + i * stride_ + j * size;
  }

  int64_t lines() const { return rows_ * ((bytes_ + kLine - 1) / kLine); }

  void ask(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  const char* row_ = nullptr;
  int64_t rows_ = 0, bytes_ = 0, stride_ = 0, at_ = 0;
};

}  // namespace qlora::QLORA_ISA
