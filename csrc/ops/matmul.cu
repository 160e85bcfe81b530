#include "ops/matmul.h"

#include "cuda/gemm.h"

namespace qlora::cuda {

namespace {

constexpr int64_t kMostGroups = 64;

/// partial[group, n] = the sum of a group of rows. A thread a column.
template <class T>
__global__ void groupSumsKernel(int64_t rows, int64_t N, int64_t rowsPerGroup, const T* dy, float* partial) {
  const int64_t n = threadIndex(), group = blockIdx.y;
  if (n >= N) return;
  const int64_t end = min(rows, (group + 1) * rowsPerGroup);
  float sum = 0;
  for (int64_t m = group * rowsPerGroup; m < end; ++m) sum += toFloat(dy[m * N + n]);
  partial[group * N + n] = sum;
}

__global__ void addGroupsKernel(int64_t groups, int64_t N, const float* partial, float* dbias) {
  const int64_t n = threadIndex();
  if (n >= N) return;
  float sum = 0;
  for (int64_t group = 0; group < groups; ++group) sum += partial[group * N + n];
  dbias[n] += sum;
}

}  // namespace

void matmulForward(Context& context, const MatmulForward& a) {
  linearForward(context, a.x, a.weight, a.bias, a.y, {});
}

void matmulBackward(Context& context, const MatmulBackward& a) {
  const int64_t N = a.weight.N, K = a.weight.K;
  gemm(context, {.form = GemmForm::nn,
                 .compute = a.dy.dtype,
                 .M = a.dy.rows(),
                 .N = K,
                 .K = N,
                 .a = elementsOf(a.dy),
                 .b = elementsOf(a.weight),
                 .out = {.c = a.dx.data<void>(), .dtype = a.dx.dtype, .stride = K}});
}

void matmulBackwardWeight(Context& context, const MatmulBackwardWeight& a) {
  const int64_t rows = a.dy.rows(), N = a.dy.dim(-1), K = a.x.dim(-1);
  if (a.dweight.defined()) {
    gemm(context, {.form = GemmForm::tn,
                   .compute = a.x.dtype,
                   .M = N,
                   .N = K,
                   .K = rows,
                   .a = elementsOf(a.dy),
                   .b = elementsOf(a.x),
                   .out = {.c = a.dweight.data<void>(), .dtype = DType::f32, .stride = K, .add = true}});
  }
  if (a.dbias.defined()) {
    const int64_t groups = std::min(rows, kMostGroups);
    const int64_t rowsPerGroup = (rows + groups - 1) / std::max<int64_t>(groups, 1);
    float* partial = context.scratch.take<float>(groups * N);
    const unsigned columns = static_cast<unsigned>((N + kThreads - 1) / kThreads);
    dispatchFloat(a.dy.dtype, [&](auto zero) {
      using T = decltype(zero);
      launch(context, groupSumsKernel<T>, dim3(columns, static_cast<unsigned>(groups)), kThreads, 0, rows, N,
             rowsPerGroup, a.dy.data<T>(), partial);
    });
    launch(context, addGroupsKernel, dim3(columns), kThreads, 0, groups, N, partial, a.dbias.data<float>());
  }
}

}  // namespace qlora::cuda
