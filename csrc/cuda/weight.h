// A weight of any kind (ops/weight.h) as kernels read it, and single elements of it. Tiles: gemm_tiles.h.
#pragma once

#include "cuda/device.h"
#include "ops/weight.h"

namespace qlora::cuda {

constexpr int kNestedShift = 8;  // of the blocks of 256 absmax that double quantization scales together

/// The absmax of 4-bit blocks, with or without double quantization.
struct BlockScales {
  const float* absmax;  // null with double quantization
  const uint8_t* index;
  const float *nestedAbsmax, *nestedCode;
  float offset;

  QLORA_DEVICE float operator[](int64_t block) const {
    return absmax ? absmax[block] : nestedCode[index[block]] * nestedAbsmax[block >> kNestedShift] + offset;
  }
};

inline BlockScales scalesOf(const Weight& w) {
  if (w.absmax.dtype == DType::f32) return {w.absmax.data<float>(), nullptr, nullptr, nullptr, 0};
  return {nullptr, w.absmax.data<uint8_t>(), w.nestedAbsmax.data<float>(), w.nestedCode.data<float>(), w.offset};
}

/// log2 of a block size.
inline int shiftOf(int64_t blockSize) { return __builtin_ctzll(static_cast<unsigned long long>(blockSize)); }

constexpr float kInverse127 = 1.0f / 127;

/// Elements that lie in rows `stride` apart: f32, bf16, f16, or i8 with or without a scale a row; or, u8, 4-bit codes,
/// whose flat index counts.
struct Elements {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  float scale = 1;                  // of floating-point ones
  const float* rowScale = nullptr;  // i8: absmax; null: the integers themselves
  const float* code = nullptr;      // 4-bit
  BlockScales scales{};
  int blockShift = 0;

  /// In fp32, not yet rounded to the compute type.
  QLORA_DEVICE float at(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    switch (dtype) {
      case DType::f32:
        return static_cast<const float*>(data)[i] * scale;
      case DType::bf16:
        return toFloat(static_cast<const bf16*>(data)[i]) * scale;
      case DType::f16:
        return toFloat(static_cast<const f16*>(data)[i]) * scale;
      case DType::i8: {
        const auto q = static_cast<float>(static_cast<const int8_t*>(data)[i]);
        return rowScale ? q * rowScale[row] * kInverse127 : q;
      }
      default: {
        const uint8_t pair = static_cast<const uint8_t*>(data)[i / 2];
        return code[i % 2 ? pair & 15 : pair >> 4] * scales[i >> blockShift];
      }
    }
  }
};

inline Elements elementsOf(const Weight& w) {
  Elements e{.data = w.data.data<void>(), .dtype = w.data.dtype, .stride = w.K};
  if (w.data.dtype == DType::i8) e.rowScale = w.absmax.data<float>();
  if (w.data.dtype == DType::u8) {
    e.code = w.code.data<float>();
    e.scales = scalesOf(w);
    e.blockShift = shiftOf(w.blockSize);
  }
  return e;
}

/// A tensor as a matrix whose columns are its last dimension.
inline Elements elementsOf(const Tensor& t, float scale = 1) {
  return {.data = t.data<void>(), .dtype = t.dtype, .stride = t.dim(-1), .scale = scale};
}

}  // namespace qlora::cuda
