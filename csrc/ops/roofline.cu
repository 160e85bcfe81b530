// f32 by multiply-adds of every thread; bf16 and f16 by mma.sync from registers, on compute capability 9.0 by wgmma
// from shared memory, with numbers as a model has them, since a GPU computes faster with zeros. Memory is read in words
// of 16 bytes.
#include <chrono>

#include "cuda/device.h"
#include "cuda/wgmma.h"
#include "ops/roofline.h"

namespace qlora::cuda {

namespace {

constexpr int kSums = 16, kProducts = 8;
#if defined(__CUDACC__)
// Some milliseconds, beside which a launch is nothing.
constexpr int64_t kBlocks = 4096, kSteps = 4096, kGroupSteps = 2048, kBytes = int64_t{256} << 20;
constexpr int kTries = 10;
#else
constexpr int64_t kBlocks = 2, kSteps = 4, kGroupSteps = 2, kBytes = int64_t{1} << 16;
constexpr int kTries = 2;
#endif

/// `seen` is written where a sum is what none is, so that the compiler keeps the loop. x is 0.
__global__ void multiplyAddKernel(int64_t steps, const float* x, float* seen) {
  const float factor = *x;
  float sum[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] = static_cast<float>(i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = fmaf(sum[i], factor, factor);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kSums; ++i) total += sum[i];
  if (total == 1.0f) *seen = total;
}

template <class T>
__global__ void productKernel(int64_t steps, const float* x, float* seen) {
  const uint32_t word = __float_as_uint(*x);
  const uint32_t a[4] = {word, word, word, word}, b[2] = {word, word};
  float sum[kProducts][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) mma<T>(sum[i], a, b);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) total += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
  if (total == 1.0f) *seen = total;
}

constexpr int kGroups = 2, kColumns = 256, kDepth = 64;  // of groupKernel: 64 rows a group
constexpr int kGroupElements = (kGroups * kGroupRows + kColumns) * kDepth;

template <class T>
__global__ void __launch_bounds__(kGroups* kGroupThreads) groupKernel(int64_t steps, float* seen) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto* bytes = dynamicShared<unsigned char>();
  bytes += (kSwizzledBytes - sharedAddress(bytes) % kSwizzledBytes) % kSwizzledBytes;
  T* const a = reinterpret_cast<T*>(bytes);
  for (unsigned i = threadIdx.x; i < kGroupElements; i += blockDim.x) {
    // Of some hundred values from -1 to 1.
    a[i] = fromFloat<T>(static_cast<float>(i * 2654435761u >> 24) / 128.0f - 1.0f);
  }
  showToGroups();
  syncBlock();
  const T *const own = a + warpIndex() / 4 * kGroupRows * kDepth, *const b = a + kGroups * kGroupRows * kDepth;
  float sum[kColumns / 8][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    beginGroup();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) multiplyGroup<T, true>(sum, {own + k}, GroupOperand<true>{b + k});
    commitGroup();
    waitForOperands();
  }
  waitForGroups<0>(sum);
  float total = 0;
#pragma unroll
  for (const auto& block : sum) total += block[0] + block[1] + block[2] + block[3];
  if (total == 1.0f) *seen = total;
#endif
}

__global__ void readKernel(int64_t words, const uint4* from, float* seen) {
  uint32_t sum = 0;
  for (int64_t i = threadIndex(); i < words; i += threadCount()) {
    const uint4 word = from[i];
    sum += word.x ^ word.y ^ word.z ^ word.w;
  }
  if (sum == 1) *seen = 1;
}

/// The least of some tries; body enqueues.
template <class F>
double leastSeconds(Context& context, F&& body) {
  double least = 1e9;
  for (int i = 0; i < kTries; ++i) {
    context.queue->wait();
    const auto start = std::chrono::steady_clock::now();
    body();
    context.queue->wait();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

}  // namespace

void roofline(Context& context, const Roofline& a) {
  auto* bytes = context.scratch.take<char>(kBytes);
  auto* zeroAndSeen = context.scratch.take<float>(2);
  if (!context.queue) return;
  setBytes(context, bytes, 0, kBytes);
  setBytes(context, zeroAndSeen, 0, 2 * sizeof(float));
  const double threads = static_cast<double>(kBlocks) * kThreads;
  double flop = threads * static_cast<double>(kSteps) * kSums * 2;
  if (a.compute != 0) flop = threads / kWarpSize * static_cast<double>(kSteps) * kProducts * (2 * 16 * 8 * 16);
  const bool byGroups = a.compute != 0 && hasWgmma(context);
  const int64_t groupBlocks = int64_t{4} * context.device->multiprocessors;
  if (byGroups) {
    flop = static_cast<double>(groupBlocks * kGroupSteps) * kGroups * kGroupRows * kColumns * kDepth * 2;
  }
  const double computing = leastSeconds(context, [&] {
    if (byGroups) {
      launch(context, a.compute == 1 ? groupKernel<bf16> : groupKernel<f16>, groupBlocks, kGroups * kGroupThreads,
             kGroupElements * 2 + kSwizzledBytes, kGroupSteps, zeroAndSeen + 1);
      return;
    }
    void (*const kernels[])(int64_t, const float*, float*) = {multiplyAddKernel, productKernel<bf16>,
                                                              productKernel<f16>};
    launch(context, kernels[a.compute], kBlocks, kThreads, 0, kSteps, zeroAndSeen, zeroAndSeen + 1);
  });
  const double reading = leastSeconds(context, [&] {
    launch(context, readKernel, kBlocks, kThreads, 0, kBytes / 16, reinterpret_cast<const uint4*>(bytes),
           zeroAndSeen + 1);
  });
  const float rates[2] = {static_cast<float>(flop / computing / 1e9),
                          static_cast<float>(static_cast<double>(kBytes) / reading / 1e9)};
  context.queue->write(a.rates.data<float>(), rates, sizeof rates);
}

}  // namespace qlora::cuda
