// A weight matrix [N, K] (N output features, K input features) in any form that a base layer may have.
//
//   kind     data              absmax                        code    nestedAbsmax       nestedCode
//   dense    f32|bf16|f16 [N, K]
//   4-bit    u8 [ceil(N K / 2)]    f32 [blocks]                  f32 [16]
//   4-bit,   u8 [ceil(N K / 2)]    u8 [blocks]                   f32 [16]  f32 [blocks / 256]  f32 [256]
//   double quantization
//   8-bit    i8 [N, K]         f32 [N], row absmax (SCB)
//
// 4-bit: blocks of blockSize run over the flat row-major array, so they straddle rows where K is no multiple of it; the
// high nibble is the even element; w = round_T(fp32(code[q] * absmax)), with T the compute dtype: one rounding, and both
// directions of a matmul see the same w. With double quantization absmax = fp32(fp32(nestedCode[index] *
// nestedAbsmax[i / 256]) + offset). 8-bit: w = fp32(fp32(q * absmax) * fp32(1 / 127)). Source: bitsandbytes' formats.
#pragma once

#include "core/check.h"
#include "core/tensor.h"

namespace qlora {

struct Weight {
  Tensor data, absmax, code, nestedAbsmax, nestedCode;
  int64_t N, K, blockSize;
  float offset;

  template <class V>
  void visit(V& v) {
    v.in(data);
    v.optionalIn(absmax);
    v.optionalIn(code);
    v.optionalIn(nestedAbsmax);
    v.optionalIn(nestedCode);
    v.value(N);
    v.value(K);
    v.value(blockSize);
    v.value(offset);
  }
  void check(const char* op) const {
    int64_t size;
    if (N < 0 || K < 0 || __builtin_mul_overflow(N, K, &size)) {
      fail("ERR_QLORA_SHAPE", "%s: a weight has no size [%lld, %lld]", op, static_cast<long long>(N),
           static_cast<long long>(K));
    }
    if (isFloat(data.dtype)) return checkShape(op, "weight", data, {N, K});
    if (data.dtype == DType::i8) {
      checkShape(op, "weight", data, {N, K});
      checkDType(op, "absmax", absmax, {DType::f32});
      return checkShape(op, "absmax", absmax, {N});
    }
    checkDType(op, "weight", data, {DType::u8});
    checkThat(blockSize >= 32 && blockSize <= 4096 && (blockSize & (blockSize - 1)) == 0, op,
              "blockSize must be a power of two from 32 to 4096");
    checkThat(data.size() == size / 2 + size % 2, op, "a 4-bit weight must hold ceil(N * K / 2) bytes");
    const int64_t blocks = size / blockSize + (size % blockSize != 0);
    checkShape(op, "code", code, {16});
    checkDType(op, "code", code, {DType::f32});
    checkShape(op, "absmax", absmax, {blocks});
    if (absmax.dtype == DType::f32) return;
    checkDType(op, "absmax", absmax, {DType::u8});
    checkDType(op, "nestedAbsmax", nestedAbsmax, {DType::f32});
    checkShape(op, "nestedAbsmax", nestedAbsmax, {(blocks + 255) / 256});
    checkDType(op, "nestedCode", nestedCode, {DType::f32});
    checkShape(op, "nestedCode", nestedCode, {256});
  }
};

}  // namespace qlora
