#include "ops/matmul.h"

#include <algorithm>

#include "simd/gemm.h"
#include "simd/linear.h"

namespace qlora::QLORA_ISA {

void matmulForward(Context& context, const MatmulForward& a) {
  linearForward(context, a.x, a.weight, a.bias, a.y, {}, nullptr);
}

void matmulBackward(Context& context, const MatmulBackward& a) {
  const int64_t N = a.weight.N, K = a.weight.K;
  gemm(context, {.form = GemmForm::nn,
                 .compute = a.dy.dtype,
                 .M = leading(a.dy),
                 .N = K,
                 .K = N,
                 .a = matrix(a.dy),
                 .b = {nullptr, DType::f32, K, &a.weight},
                 .c = a.dx.data<void>(),
                 .cDtype = a.dx.dtype,
                 .cStride = K});
}

void matmulBackwardWeight(Context& context, const MatmulBackwardWeight& a) {
  const int64_t rows = leading(a.dy), N = a.dy.dim(-1), K = a.x.dim(-1);
  if (a.dweight.defined()) {
    gemm(context, {.form = GemmForm::tn,
                   .compute = a.x.dtype,
                   .M = N,
                   .N = K,
                   .K = rows,
                   .a = matrix(a.dy),
                   .b = matrix(a.x),
                   .c = a.dweight.data<void>(),
                   .cDtype = DType::f32,
                   .cStride = K,
                   .store = GemmStore::add});
  }
  if (a.dbias.defined()) {
    constexpr int64_t kColumnsPerTask = 64;
    float* dbias = a.dbias.data<float>();
    dispatchFloat(a.dy.dtype, [&](auto zero) {
      const auto* dy = a.dy.data<decltype(zero)>();
      context.pool.parallelFor((N + kColumnsPerTask - 1) / kColumnsPerTask, [&](int64_t task, int) {
        const int64_t begin = task * kColumnsPerTask, count = std::min(kColumnsPerTask, N - begin);
        float sum[kColumnsPerTask] = {};
        for (int64_t m = 0; m < rows; ++m) {
          const auto* line = dy + m * N + begin;
          for (int64_t i = 0; i < count; ++i) sum[i] += toFloat(line[i]);
        }
        for (int64_t i = 0; i < count; ++i) dbias[begin + i] += sum[i];
      });
    });
  }
}

}  // namespace qlora::QLORA_ISA
