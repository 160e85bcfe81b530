#include "ops/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "simd/lanes.h"

namespace qlora::QLORA_ISA {

namespace {

// Rows a task: enough work to pay for handing it out.
constexpr int64_t kRowsPerTask = 8;
// Row groups whose sums for dweight are kept apart and added in order, whatever the number of threads.
constexpr int64_t kGroups = 16;

}  // namespace

void rmsNormForward(Context& context, const RmsNormForward& a) {
  const int64_t rows = a.x.rows(), D = a.x.dim(-1);
  float* rstd = a.rstd.data<float>();
  float* scale = context.scratch.take<float>(D);
  dispatchFloat(a.weight.dtype, [&](auto zero) {
    const auto* weight = a.weight.data<decltype(zero)>();
    for (int64_t d = 0; d < D; ++d) scale[d] = toFloat(weight[d]) + a.offset;
  });
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = a.x.data<T>();
    T* y = a.y.data<T>();
    context.pool.parallelFor((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
      for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
        const T* xi = x + i * D;
        T* yi = y + i * D;
        const float squares = laneSum(D, [&](int64_t d) { return toFloat(xi[d]) * toFloat(xi[d]); });
        const float r = 1.0f / std::sqrt(squares / static_cast<float>(D) + a.eps);
        rstd[i] = r;
        for (int64_t d = 0; d < D; ++d) yi[d] = fromFloat<T>(toFloat(xi[d]) * r * scale[d]);
      }
    });
  });
}

void rmsNormBackward(Context& context, const RmsNormBackward& a) {
  const int64_t rows = a.x.rows(), D = a.x.dim(-1);
  const float* rstd = a.rstd.data<float>();
  float* scale = context.scratch.take<float>(D);
  dispatchFloat(a.weight.dtype, [&](auto zero) {
    const auto* weight = a.weight.data<decltype(zero)>();
    for (int64_t d = 0; d < D; ++d) scale[d] = toFloat(weight[d]) + a.offset;
  });
  const int64_t groups = std::min(rows, kGroups), rowsPerGroup = (rows + groups - 1) / std::max<int64_t>(groups, 1);
  float* partial = a.dweight.defined() ? context.scratch.take<float>(groups * D) : nullptr;
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = a.x.data<T>();
    const T* dy = a.dy.data<T>();
    T* dx = a.dx.dataOrNull<T>();
    context.pool.parallelFor(groups, [&](int64_t group, int) {
      float* sum = partial ? partial + group * D : nullptr;
      if (sum) std::fill(sum, sum + D, 0.0f);
      for (int64_t i = group * rowsPerGroup; i < std::min(rows, (group + 1) * rowsPerGroup); ++i) {
        const T* xi = x + i * D;
        const T* dyi = dy + i * D;
        const float r = rstd[i];
        if (sum) {
          for (int64_t d = 0; d < D; ++d) sum[d] += toFloat(dyi[d]) * toFloat(xi[d]) * r;
        }
        if (dx) {
          T* dxi = dx + i * D;
          const float mean =
              laneSum(D, [&](int64_t d) { return toFloat(dyi[d]) * scale[d] * (toFloat(xi[d]) * r); }) /
              static_cast<float>(D);
          for (int64_t d = 0; d < D; ++d) {
            dxi[d] = fromFloat<T>(r * (toFloat(dyi[d]) * scale[d] - toFloat(xi[d]) * r * mean));
          }
        }
      }
    });
  });
  if (partial) {
    float* dweight = a.dweight.data<float>();
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t d = 0; d < D; ++d) dweight[d] += partial[group * D + d];
    }
  }
}

}  // namespace qlora::QLORA_ISA
