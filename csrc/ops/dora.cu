#include "ops/dora.h"

#include "cuda/weight.h"

namespace qlora::cuda {

namespace {

constexpr int kRows = 8;      // of a block: A is read once for them
constexpr int kMostRank = 16;  // of B that is held at a time
constexpr int64_t kMostGroups = 64;

/// norm of kRows rows. A thread has columns, for which it sums B A of each row.
template <class T>
__global__ void rowNormKernel(int64_t N, int64_t K, int64_t r, Elements w, const float* A, const float* B, float scale,
                              float* norm) {
  QLORA_SHARED_ARRAY(float, ofB, kRows* kMostRank);
  const int64_t first = int64_t{blockIdx.x} * kRows;
  float squares[kRows] = {};
  for (int64_t k0 = 0; k0 < K; k0 += blockDim.x) {
    const int64_t k = k0 + threadIdx.x;
    float delta[kRows] = {};
    for (int64_t i0 = 0; i0 < r; i0 += kMostRank) {
      const int count = static_cast<int>(min(int64_t{kMostRank}, r - i0));
      syncBlock();
      for (int at = static_cast<int>(threadIdx.x); at < kRows * kMostRank; at += static_cast<int>(blockDim.x)) {
        const int64_t n = first + at / kMostRank;
        const int i = at % kMostRank;
        ofB[at] = n < N && i < count ? B[n * r + i0 + i] : 0.0f;
      }
      syncBlock();
      for (int i = 0; k < K && i < count; ++i) {
        const float from = A[(i0 + i) * K + k];
#pragma unroll
        for (int row = 0; row < kRows; ++row) delta[row] += ofB[row * kMostRank + i] * from;
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (k >= K || first + row >= N) continue;
      const float value = toFloat(fromFloat<T>(w.at(first + row, k))) + scale * delta[row];
      squares[row] += value * value;
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum = blockSum(squares[row]);
    if (threadIdx.x == 0 && first + row < N) norm[first + row] = sqrtf(sum);
  }
}

template <class T>
__global__ void scaleKernel(int64_t size, int64_t N, const T* z, const float* magnitude, const float* norm,
                            const void* bias, DType biasDtype, T* y) {
  const Elements added{.data = bias, .dtype = biasDtype};
  for (int64_t i = threadIndex(); i < size; i += threadCount()) {
    const int64_t n = i % N;
    const float offset = bias ? added.at(0, n) : 0.0f;
    y[i] = fromFloat<T>(toFloat(z[i]) * (magnitude[n] / norm[n]) + offset);
  }
}

/// dz, and partial[group, n] = sum over the group's rows of dy z; either may be null. A thread a column.
template <class T>
__global__ void backwardKernel(int64_t rows, int64_t N, int64_t rowsPerGroup, const T* dy, const T* z,
                               const float* magnitude, const float* norm, T* dz, float* partial) {
  const int64_t n = threadIndex(), group = blockIdx.y;
  if (n >= N) return;
  const int64_t end = min(rows, (group + 1) * rowsPerGroup);
  const float ratio = magnitude[n] / norm[n];
  float sum = 0;
  for (int64_t i = group * rowsPerGroup * N + n; i < end * N; i += N) {
    sum += toFloat(dy[i]) * toFloat(z[i]);
    if (dz) dz[i] = fromFloat<T>(toFloat(dy[i]) * ratio);
  }
  if (partial) partial[group * N + n] = sum;
}

__global__ void addGroupsKernel(int64_t groups, int64_t N, const float* partial, const float* norm,
                                float* dmagnitude) {
  const int64_t n = threadIndex();
  if (n >= N) return;
  float sum = 0;
  for (int64_t group = 0; group < groups; ++group) sum += partial[group * N + n];
  dmagnitude[n] += sum / norm[n];
}

}  // namespace

void loraRowNorm(Context& context, const LoraRowNorm& a) {
  const int64_t N = a.weight.N;
  dispatchFloat(static_cast<DType>(a.compute), [&](auto zero) {
    launch(context, rowNormKernel<decltype(zero)>, (N + kRows - 1) / kRows, kThreads, 0, N, a.weight.K, a.loraA.dim(0),
           elementsOf(a.weight), a.loraA.data<float>(), a.loraB.data<float>(), a.scale, a.norm.data<float>());
  });
}

void doraScaleForward(Context& context, const DoraScaleForward& a) {
  dispatchFloat(a.z.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(context, scaleKernel<T>, blocksFor(a.z.size()), kThreads, 0, a.z.size(), a.norm.size(), a.z.data<T>(),
           a.magnitude.data<float>(), a.norm.data<float>(), a.bias.dataOrNull<void>(), a.bias.dtype, a.y.data<T>());
  });
}

void doraScaleBackward(Context& context, const DoraScaleBackward& a) {
  const int64_t N = a.norm.size(), rows = N > 0 ? a.z.size() / N : 0;
  const int64_t groups = std::min(rows, kMostGroups);
  const int64_t rowsPerGroup = (rows + groups - 1) / std::max<int64_t>(groups, 1);
  const unsigned columns = static_cast<unsigned>((N + kThreads - 1) / kThreads);
  float* partial = a.dmagnitude.defined() ? context.scratch.take<float>(groups * N) : nullptr;
  dispatchFloat(a.z.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(context, backwardKernel<T>, dim3(columns, static_cast<unsigned>(groups)), kThreads, 0, rows, N, rowsPerGroup,
           a.dy.data<T>(), a.z.data<T>(), a.magnitude.data<float>(), a.norm.data<float>(), a.dz.dataOrNull<T>(),
           partial);
  });
  if (!partial) return;
  launch(context, addGroupsKernel, dim3(columns), kThreads, 0, groups, N, partial, a.norm.data<float>(),
         a.dmagnitude.data<float>());
}

}  // namespace qlora::cuda
