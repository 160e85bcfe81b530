// A block a row: its threads sum in strides, then in a fixed tree. dweight: blocks sum a group of rows for some
// columns, and the groups' sums are added in order.
#include "cuda/rows.h"
#include "ops/rms_norm.h"

namespace qlora::cuda {

namespace {

constexpr int64_t kMostGroups = 64;

template <int count, class T, class W>
__global__ void forwardKernel(int64_t rows, int64_t D, const T* x, const W* weight, T* y, float* rstd, float eps,
                              float offset) {
  beginEarly();
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const T* xi = x + i * D;
    float squares = 0;
    forPacks<count>(D, [&](int64_t d) {
      const auto pack = loadPack<count>(xi + d);
#pragma unroll
      for (int k = 0; k < count; ++k) squares += toFloat(pack.value[k]) * toFloat(pack.value[k]);
    });
    const float r = 1.0f / sqrtf(blockSum(squares) / static_cast<float>(D) + eps);
    if (threadIdx.x == 0) rstd[i] = r;
    forPacks<count>(D, [&](int64_t d) {
      const auto pack = loadPack<count>(xi + d);
      Pack<T, count> out;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        out.value[k] = fromFloat<T>(toFloat(pack.value[k]) * r * (toFloat(weight[d + k]) + offset));
      }
      storePack<count>(y + i * D + d, out);
    });
  }
}

template <int count, class T, class W>
__global__ void inputKernel(int64_t rows, int64_t D, const T* dy, const T* x, const W* weight, const float* rstd, T* dx,
                            float offset) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float r = rstd[i];
    float sum = 0;
    forPacks<count>(D, [&](int64_t d) {
      const auto xs = loadPack<count>(x + i * D + d), dys = loadPack<count>(dy + i * D + d);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        sum += toFloat(dys.value[k]) * (toFloat(weight[d + k]) + offset) * (toFloat(xs.value[k]) * r);
      }
    });
    const float mean = blockSum(sum) / static_cast<float>(D);
    forPacks<count>(D, [&](int64_t d) {
      const auto xs = loadPack<count>(x + i * D + d), dys = loadPack<count>(dy + i * D + d);
      Pack<T, count> out;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        const float g = toFloat(dys.value[k]) * (toFloat(weight[d + k]) + offset);
        out.value[k] = fromFloat<T>(r * (g - toFloat(xs.value[k]) * r * mean));
      }
      storePack<count>(dx + i * D + d, out);
    });
  }
}

/// partial[group, d] = sum over the group's rows of dy xhat. A thread has a column.
template <class T>
__global__ void groupSumsKernel(int64_t rows, int64_t D, int64_t rowsPerGroup, const T* dy, const T* x,
                                const float* rstd, float* partial) {
  const int64_t d = threadIndex(), group = blockIdx.y;
  if (d >= D) return;
  const int64_t end = min(rows, (group + 1) * rowsPerGroup);
  float sum = 0;
  for (int64_t i = group * rowsPerGroup; i < end; ++i) sum += toFloat(dy[i * D + d]) * toFloat(x[i * D + d]) * rstd[i];
  partial[group * D + d] = sum;
}

__global__ void addGroupsKernel(int64_t groups, int64_t D, const float* partial, float* dweight) {
  const int64_t d = threadIndex();
  if (d >= D) return;
  float sum = dweight[d];
  for (int64_t group = 0; group < groups; ++group) sum += partial[group * D + d];
  dweight[d] = sum;
}

}  // namespace

void rmsNormForward(Context& context, const RmsNormForward& a) {
  const int64_t rows = a.x.rows(), D = a.x.dim(-1);
  dispatchFloat(a.x.dtype, [&](auto x) {
    dispatchFloat(a.weight.dtype, [&](auto weight) {
      using T = decltype(x);
      using W = decltype(weight);
      dispatchPack<kPack<T>>(D, [&](auto pack) {
        launchEarly(context, forwardKernel<decltype(pack)::value, T, W>, rowBlocks(rows), kThreads, 0, rows, D,
                    a.x.data<T>(), a.weight.data<W>(), a.y.data<T>(), a.rstd.data<float>(), a.eps, a.offset);
      });
    });
  });
}

void rmsNormBackward(Context& context, const RmsNormBackward& a) {
  const int64_t rows = a.x.rows(), D = a.x.dim(-1);
  const float* rstd = a.rstd.data<float>();
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = a.x.data<T>(), *dy = a.dy.data<T>();
    if (a.dx.defined()) {
      dispatchFloat(a.weight.dtype, [&](auto weight) {
        using W = decltype(weight);
        dispatchPack<kPack<T>>(D, [&](auto pack) {
          launch(context, inputKernel<decltype(pack)::value, T, W>, rowBlocks(rows), kThreads, 0, rows, D, dy, x,
                 a.weight.data<W>(), rstd, a.dx.data<T>(), a.offset);
        });
      });
    }
    if (a.dweight.defined()) {
      const int64_t groups = std::min(rows, kMostGroups);
      const int64_t rowsPerGroup = (rows + groups - 1) / std::max<int64_t>(groups, 1);
      float* partial = context.scratch.take<float>(groups * D);
      const unsigned columns = static_cast<unsigned>((D + kThreads - 1) / kThreads);
      launch(context, groupSumsKernel<T>, dim3(columns, static_cast<unsigned>(groups)), kThreads, 0, rows, D,
             rowsPerGroup, dy, x, rstd, partial);
      launch(context, addGroupsKernel, dim3(columns), kThreads, 0, groups, D, partial, a.dweight.data<float>());
    }
  });
}

}  // namespace qlora::cuda
