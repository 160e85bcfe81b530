// Blockwise quantization, byte for byte what bitsandbytes stores.
//
// quantize4bit, over blocks of blockSize elements of the flat row-major x:
//   absmax[b]  = max |x|                     not clamped; a zero block stores 0
//   code[i]    = search(x[i] * (1 / max(absmax[b], 1e-38)))     core/codes.h: NF4 or FP4
//   packed[j]  = code[2 j] << 4 | code[2 j + 1]                 an odd count is padded with the code of 0
// doubleQuantize, of those absmax:
//   offset     = mean(absmax), summed in fp64 in a fixed order, rounded to fp32
//   index, nestedAbsmax = quantize8bit(absmax - offset, signed map)
// quantize8bit, over blocks of 256: index[i] = the nearest entry of the dynamic map to x[i] * (1 / max(absmax, 1e-38)).
// quantizeInt8, by rows of x [N, K] rounded to fp16 (LLM.int8; Dettmers et al., 2022):
//   absmax[n]  = max |x[n, :]|,   q = round_even(x * (127 * (1 / absmax[n])));   a zero row gives zeros
//
// x of any floating-point type; arithmetic in fp32, each operation rounded once. A value that is not finite fails the
// operation with ERR_QLORA_NON_FINITE and the place of the first.
#pragma once

#include "core/check.h"
#include "core/codes.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct Quantize4bit {
  Tensor x, packed, absmax;
  int type;  // FourBitType
  int64_t blockSize;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(packed);
    v.out(absmax);
    v.value(type);
    v.value(blockSize);
  }
  void check() const {
    checkFloat("quantize4bit", "x", x);
    checkThat(type == 0 || type == 1, "quantize4bit", "type must be 0 (NF4) or 1 (FP4)");
    checkThat(blockSize >= 32 && blockSize <= 4096 && (blockSize & (blockSize - 1)) == 0, "quantize4bit",
              "blockSize must be a power of two from 32 to 4096");
    checkDType("quantize4bit", "packed", packed, {DType::u8});
    checkShape("quantize4bit", "packed", packed, {(x.size() + 1) / 2});
    checkDType("quantize4bit", "absmax", absmax, {DType::f32});
    checkShape("quantize4bit", "absmax", absmax, {(x.size() + blockSize - 1) / blockSize});
  }
};

struct DoubleQuantize {
  Tensor absmax, index, nestedAbsmax, offset;

  template <class V>
  void visit(V& v) {
    v.in(absmax);
    v.out(index);
    v.out(nestedAbsmax);
    v.out(offset);
  }
  void check() const {
    checkDType("doubleQuantize", "absmax", absmax, {DType::f32});
    checkShape("doubleQuantize", "absmax", absmax, {-1});
    checkDType("doubleQuantize", "index", index, {DType::u8});
    checkSameShape("doubleQuantize", "index", index, absmax);
    checkDType("doubleQuantize", "nestedAbsmax", nestedAbsmax, {DType::f32});
    checkShape("doubleQuantize", "nestedAbsmax", nestedAbsmax, {(absmax.size() + 255) / 256});
    checkDType("doubleQuantize", "offset", offset, {DType::f32});
    checkShape("doubleQuantize", "offset", offset, {1});
  }
};

struct Quantize8bit {
  Tensor x, index, absmax;
  int map;  // DynamicMapKind

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(index);
    v.out(absmax);
    v.value(map);
  }
  void check() const {
    checkDType("quantize8bit", "x", x, {DType::f32});
    checkThat(map == 0 || map == 1, "quantize8bit", "map must be 0 (signed) or 1 (unsigned)");
    checkDType("quantize8bit", "index", index, {DType::u8});
    checkSameShape("quantize8bit", "index", index, x);
    checkDType("quantize8bit", "absmax", absmax, {DType::f32});
    checkShape("quantize8bit", "absmax", absmax, {(x.size() + 255) / 256});
  }
};

struct QuantizeInt8 {
  Tensor x, q, absmax;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(q);
    v.out(absmax);
  }
  void check() const {
    checkFloat("quantizeInt8", "x", x);
    checkShape("quantizeInt8", "x", x, {-1, -1});
    checkDType("quantizeInt8", "q", q, {DType::i8});
    checkSameShape("quantizeInt8", "q", q, x);
    checkDType("quantizeInt8", "absmax", absmax, {DType::f32});
    checkShape("quantizeInt8", "absmax", absmax, {x.dim(0)});
  }
};

}  // namespace qlora
