#include "ops/cast.h"

#include "simd/chunks.h"

namespace qlora::QLORA_ISA {

void cast(Context& context, const Cast& a) {
  dispatchFloat(a.x.dtype, [&](auto from) {
    dispatchFloat(a.y.dtype, [&](auto to) {
      using X = decltype(from);
      using Y = decltype(to);
      const X* __restrict x = a.x.data<X>();
      Y* __restrict y = a.y.data<Y>();
      forChunks(context, a.x.size(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) y[i] = fromFloat<Y>(toFloat(x[i]));
      });
    });
  });
}

}  // namespace qlora::QLORA_ISA
