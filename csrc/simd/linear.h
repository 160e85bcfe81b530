// The frozen layer of a linear operation: what matmul and the LoRA operations share.
#pragma once

#include "simd/gemm.h"

namespace qlora::QLORA_ISA {

/// The product of the leading dimensions.
QLORA_INLINE int64_t leading(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i + 1 < t.rank; ++i) n *= t.shape[i];
  return n;
}

/// A tensor as a matrix whose columns are its last dimension.
QLORA_INLINE GemmOperand matrix(const Tensor& t, float scale = 1) {
  return {t.data<void>(), t.dtype, t.dim(-1), nullptr, scale};
}

/// y = x W^T + bias + extra, W [N, K]; the compute type is x's. `packed`, which may be null, is x packed for nt.
///
/// An 8-bit W multiplies as LLM.int8 does: x is cast to fp16; columns of x with any |x| >= 6 are multiplied with W
/// dequantized to fp16; of the rest each row becomes integers q = rne(x * fp32(127 * fp32(1 / absmax))), and
/// y = sum(q qW) * absmax * absmaxW / 16129. The integer sums are exact up to 2^24, then rounded as fp32 is.
void linearForward(Context& context, const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& y,
                   const GemmExtra& extra, const PackedA* packed);

}  // namespace qlora::QLORA_ISA
