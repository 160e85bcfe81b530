#include "ops/dequantize.h"

#include "cuda/device.h"
#include "cuda/weight.h"

namespace qlora::cuda {

namespace {

constexpr int kGroup = 8;  // codes of 4 bits that a thread takes: no block ends within
constexpr int kDynamicShift = 8;

struct Table {
  float value[256];
};

template <class T>
__global__ void fourBitKernel(int64_t n, Elements w, T* y) {
  QLORA_SHARED_ARRAY(float, code, 16);
  if (threadIdx.x < 16) code[threadIdx.x] = w.code[threadIdx.x];
  syncBlock();
  const auto* packed = static_cast<const uint8_t*>(w.data);
  for (int64_t g = threadIndex(); g * kGroup < n; g += threadCount()) {
    const int64_t first = g * kGroup;
    const float absmax = w.scales[first >> w.blockShift];
    if (first + kGroup <= n) {
      const auto bytes = loadPack<4>(packed + first / 2);
      T out[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        out[i] = fromFloat<T>(code[i % 2 ? bytes.value[i / 2] & 15 : bytes.value[i / 2] >> 4] * absmax);
      }
#pragma unroll
      for (int i = 0; i < kGroup; i += kPack<T>) {
        Pack<T, kPack<T>> pack;
#pragma unroll
        for (int k = 0; k < kPack<T>; ++k) pack.value[k] = out[i + k];
        storePack<kPack<T>>(y + first + i, pack);
      }
    } else {
      for (int64_t i = first; i < n; ++i) {
        y[i] = fromFloat<T>(code[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * absmax);
      }
    }
  }
}

/// Of every other kind. blockIdx.y has the row.
template <class T>
__global__ void elementsKernel(int64_t N, int64_t K, Elements w, T* y) {
  for (int64_t row = blockIdx.y; row < N; row += gridDim.y) {
    for (int64_t k = threadIndex(); k < K; k += threadCount()) y[row * K + k] = fromFloat<T>(w.at(row, k));
  }
}

__global__ void dynamicKernel(int64_t n, const uint8_t* index, const float* absmax, Table table, float* y) {
  QLORA_SHARED_ARRAY(float, code, 256);
  code[threadIdx.x] = table.value[threadIdx.x];
  syncBlock();
  for (int64_t i = threadIndex(); i < n; i += threadCount()) y[i] = code[index[i]] * absmax[i >> kDynamicShift];
}

__global__ void tableKernel(int count, Table table, float* y) {
  if (static_cast<int>(threadIdx.x) < count) y[threadIdx.x] = table.value[threadIdx.x];
}

Table tableOf(const float* code, int count) {
  Table table{};
  std::copy_n(code, count, table.value);
  return table;
}

}  // namespace

void dequantize(Context& context, const Dequantize& a) {
  const int64_t N = a.weight.N, K = a.weight.K;
  const Elements w = elementsOf(a.weight);
  dispatchFloat(a.y.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* y = a.y.data<T>();
    if (w.dtype == DType::u8) {
      launch(context, fourBitKernel<T>, blocksFor((N * K + kGroup - 1) / kGroup), kThreads, 0, N * K, w, y);
    } else {
      const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocksFor(K), 16)),
                      static_cast<unsigned>(std::min<int64_t>(N, 32768)));
      launch(context, elementsKernel<T>, grid, kThreads, 0, N, K, w, y);
    }
  });
}

void dequantize8bit(Context& context, const Dequantize8bit& a) {
  const int64_t n = a.index.size();
  launch(context, dynamicKernel, blocksFor(n), kThreads, 0, n, a.index.data<const uint8_t>(),
         a.absmax.data<const float>(), tableOf(dynamicMap(static_cast<DynamicMapKind>(a.map)).code, 256),
         a.y.data<float>());
}

void fourBitCode(Context& context, const FourBitCode& a) {
  const float* code = qlora::fourBitCode(static_cast<FourBitType>(a.type));
  launch(context, tableKernel, 1, kThreads, 0, 16, tableOf(code, 16), a.y.data<float>());
}

void dynamicMapCode(Context& context, const DynamicMapCode& a) {
  const float* code = dynamicMap(static_cast<DynamicMapKind>(a.map)).code;
  launch(context, tableKernel, 1, kThreads, 0, 256, tableOf(code, 256), a.y.data<float>());
}

}  // namespace qlora::cuda
