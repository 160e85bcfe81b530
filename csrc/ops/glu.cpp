#include "ops/glu.h"

#include "simd/chunks.h"

namespace qlora::QLORA_ISA {

void gluForward(Context& context, const GluForward& a) {
  dispatchFloat(a.gate.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* gate = a.gate.data<T>();
    const T* up = a.up.data<T>();
    T* __restrict y = a.y.data<T>();
    dispatchActivation(static_cast<Activation>(a.activation), [&](auto kind) {
      forChunks(context, a.gate.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          y[i] = fromFloat<T>(activate<kind.value>(toFloat(gate[i])).value * toFloat(up[i]));
        }
      });
    });
  });
}

void gluBackward(Context& context, const GluBackward& a) {
  dispatchFloat(a.gate.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* dy = a.dy.data<T>();
    const T* gate = a.gate.data<T>();
    const T* up = a.up.data<T>();
    T* __restrict dgate = a.dgate.data<T>();
    T* __restrict dup = a.dup.data<T>();
    dispatchActivation(static_cast<Activation>(a.activation), [&](auto kind) {
      forChunks(context, a.gate.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const ValueAndSlope f = activate<kind.value>(toFloat(gate[i]));
          const float d = toFloat(dy[i]);
          dgate[i] = fromFloat<T>(d * toFloat(up[i]) * f.slope);
          dup[i] = fromFloat<T>(d * f.value);
        }
      });
    });
  });
}

}  // namespace qlora::QLORA_ISA
