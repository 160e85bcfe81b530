// f32 by multiply-adds of every thread; bf16 and f16 by mma.sync from registers, which on compute capability 9.0 is
// below what wgmma reaches (mma.h). Memory is read in words of 16 bytes.
#include <chrono>

#include "cuda/device.h"
#include "cuda/mma.h"
#include "ops/roofline.h"

namespace qlora::cuda {

namespace {

constexpr int kSums = 16, kProducts = 8;
#if defined(__CUDACC__)
// Some milliseconds, beside which a launch is nothing.
constexpr int64_t kBlocks = 4096, kSteps = 4096, kBytes = int64_t{256} << 20;
constexpr int kTries = 10;
#else
constexpr int64_t kBlocks = 2, kSteps = 4, kBytes = int64_t{1} << 16;
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
  const double computing = leastSeconds(context, [&] {
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
