// The Euclidean norm of all gradients together, and whether it is finite.
//
//   out[0] = sqrt(sum over every element of every gradient of g^2)
//   out[1] = 1 if out[0] is finite, else 0
//
// grads: f32 of any shapes; out f32 [2]. Summed in fp64 in a fixed order.
#pragma once

#include <vector>

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct GradNorm {
  std::vector<Tensor> grads;
  Tensor out;

  template <class V>
  void visit(V& v) {
    v.in(grads);
    v.out(out);
  }
  void check() const {
    for (const Tensor& g : grads) checkDType("gradNorm", "grads", g, {DType::f32});
    checkDType("gradNorm", "out", out, {DType::f32});
    checkShape("gradNorm", "out", out, {2});
  }
};

}  // namespace qlora
