#include "cuda/map.h"
#include "ops/cast.h"

namespace qlora::cuda {

namespace {

struct Same {
  QLORA_DEVICE float operator()(int64_t, float x) const { return x; }
};

}  // namespace

void cast(Context& context, const Cast& a) {
  dispatchFloat(a.x.dtype, [&](auto from) {
    dispatchFloat(a.y.dtype, [&](auto to) {
      map(context, a.x.size(), Same{}, a.y.data<decltype(to)>(), a.x.data<const decltype(from)>());
    });
  });
}

}  // namespace qlora::cuda
