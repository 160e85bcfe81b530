// Dequantization, and the tables that it reads.
//
//   dequantize       y = a weight of any kind (ops/weight.h), each value rounded once to y's type, subnormals kept
//   dequantize8bit   y[i] = map[index[i]] * absmax[i / 256]
//   fourBitCode      y = the 16 values of NF4 or FP4
//   dynamicMapCode   y = the 256 values of the signed or the unsigned dynamic map
//
// y of dequantize [N, K] of any floating-point type; fp32 elsewhere.
#pragma once

#include "core/check.h"
#include "core/codes.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "ops/weight.h"

namespace qlora {

struct Dequantize {
  Weight weight;
  Tensor y;

  template <class V>
  void visit(V& v) {
    weight.visit(v);
    v.out(y);
  }
  void check() const {
    weight.check("dequantize");
    checkFloat("dequantize", "y", y);
    checkShape("dequantize", "y", y, {weight.N, weight.K});
  }
};

struct Dequantize8bit {
  Tensor index, absmax, y;
  int map;  // DynamicMapKind

  template <class V>
  void visit(V& v) {
    v.in(index);
    v.in(absmax);
    v.out(y);
    v.value(map);
  }
  void check() const {
    checkDType("dequantize8bit", "index", index, {DType::u8});
    checkThat(map == 0 || map == 1, "dequantize8bit", "map must be 0 (signed) or 1 (unsigned)");
    checkDType("dequantize8bit", "absmax", absmax, {DType::f32});
    checkShape("dequantize8bit", "absmax", absmax, {(index.size() + 255) / 256});
    checkDType("dequantize8bit", "y", y, {DType::f32});
    checkSameShape("dequantize8bit", "y", y, index);
  }
};

struct FourBitCode {
  Tensor y;
  int type;  // FourBitType

  template <class V>
  void visit(V& v) {
    v.out(y);
    v.value(type);
  }
  void check() const {
    checkThat(type == 0 || type == 1, "fourBitCode", "type must be 0 (NF4) or 1 (FP4)");
    checkDType("fourBitCode", "y", y, {DType::f32});
    checkShape("fourBitCode", "y", y, {16});
  }
};

struct DynamicMapCode {
  Tensor y;
  int map;  // DynamicMapKind

  template <class V>
  void visit(V& v) {
    v.out(y);
    v.value(map);
  }
  void check() const {
    checkThat(map == 0 || map == 1, "dynamicMapCode", "map must be 0 (signed) or 1 (unsigned)");
    checkDType("dynamicMapCode", "y", y, {DType::f32});
    checkShape("dynamicMapCode", "y", y, {256});
  }
};

}  // namespace qlora
