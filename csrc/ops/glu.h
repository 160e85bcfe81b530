// Gated linear units (Shazeer, "GLU variants improve transformer", 2020).
//
//   y[i] = f(gate[i]) * up[i]
//   dgate[i] = dy[i] * up[i] * f'(gate[i])
//   dup[i] = dy[i] * f(gate[i])
//
// f: 0 silu, 1 gelu with tanh, 2 gelu with erf, 3 relu (simd/activation.h). All tensors of one shape and one
// floating-point type; fp32 arithmetic, one rounding.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "simd/activation.h"

namespace qlora {

namespace detail {

inline void checkGlu(const char* op, const Tensor& gate, int activation) {
  checkFloat(op, "gate", gate);
  if (activation < 0 || activation >= kActivations) {
    fail("ERR_QLORA_ARGUMENT", "%s: activation must be from 0 to %d, got %d", op, kActivations - 1, activation);
  }
}

inline void checkLikeGate(const char* op, const char* argument, const Tensor& t, const Tensor& gate) {
  checkDType(op, argument, t, {gate.dtype});
  checkSameShape(op, argument, t, gate);
}

}  // namespace detail

struct GluForward {
  Tensor gate, up, y;
  int activation;

  template <class V>
  void visit(V& v) {
    v.in(gate);
    v.in(up);
    v.out(y);
    v.value(activation);
  }
  void check() const {
    detail::checkGlu("glu", gate, activation);
    detail::checkLikeGate("glu", "up", up, gate);
    detail::checkLikeGate("glu", "y", y, gate);
  }
};

struct GluBackward {
  Tensor dy, gate, up, dgate, dup;
  int activation;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(gate);
    v.in(up);
    v.out(dgate);
    v.out(dup);
    v.value(activation);
  }
  void check() const {
    detail::checkGlu("gluBackward", gate, activation);
    detail::checkLikeGate("gluBackward", "dy", dy, gate);
    detail::checkLikeGate("gluBackward", "up", up, gate);
    detail::checkLikeGate("gluBackward", "dgate", dgate, gate);
    detail::checkLikeGate("gluBackward", "dup", dup, gate);
  }
};

}  // namespace qlora
