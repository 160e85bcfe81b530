// What the machine can do, measured: the bounds that a bench divides by. Not part of a model.
//
//   rates[0]  GFLOP/s of multiply-adds from registers on all threads, of the kind that a matmul of `compute` uses
//             (0 f32, 1 bf16, 2 f16); of AMX's tiles with operands from the second cache, since no matmul has them nearer
//   rates[1]  GB/s read from memory on all threads, over 256 MiB
//
// Each the best of many short tries. rates [2] f32, overwritten.
#pragma once

#include "core/check.h"
#include "core/stream.h"

namespace qlora {

struct Roofline {
  Tensor rates;
  int32_t compute;

  template <class V>
  void visit(V& v) {
    v.out(rates);
    v.value(compute);
  }
  void check() const {
    checkDType("roofline", "rates", rates, {DType::f32});
    checkShape("roofline", "rates", rates, {2});
    checkThat(compute >= 0 && compute <= 2, "roofline", "compute must be 0 (f32), 1 (bf16) or 2 (f16)");
  }
};

}  // namespace qlora
