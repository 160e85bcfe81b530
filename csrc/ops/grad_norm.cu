#include "cuda/tensor_list.h"
#include "ops/grad_norm.h"

namespace qlora::cuda {

namespace {

/// In fp64: squares of large gradients overflow fp32.
__global__ void squaresKernel(const Place<1>* places, double* partial) {
  const Place<1> place = places[blockIdx.x];
  const float* g = reinterpret_cast<const float*>(place.at[0]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < place.count; i += blockDim.x) {
    sum += static_cast<double>(g[i]) * static_cast<double>(g[i]);
  }
  sum = blockReduce(sum, 0.0, Sum{});
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// One block.
__global__ void normKernel(int64_t n, const double* partial, float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
  sum = blockReduce(sum, 0.0, Sum{});
  if (threadIdx.x != 0) return;
  const float norm = static_cast<float>(sqrt(sum));
  out[0] = norm;
  out[1] = norm - norm == 0.0f ? 1.0f : 0.0f;  // of infinity and NaN this is NaN
}

}  // namespace

void gradNorm(Context& context, const GradNorm& a) {
  const Places<1> places = placesOf<1>(context, {{&a.grads, 1, 4}});
  double* partial = context.scratch.take<double>(places.count);
  launch(context, squaresKernel, places.count, kThreads, 0, places.data, partial);
  launch(context, normKernel, int64_t{1}, kThreads, 0, places.count, partial, a.out.data<float>());
}

}  // namespace qlora::cuda
