// Kernels that do nothing else, timed by the host from an empty queue to an empty queue; they last some milliseconds,
// so that what a launch costs does not show. 16-bit rates are those of mma.sync, which the products here are made of.
#include <chrono>

#include "cuda/device.h"
#include "cuda/mma.h"
#include "ops/roofline.h"

namespace qlora::cuda {

namespace {

constexpr int64_t kBlocks = 2112;  // whole waves of most GPUs, and many
constexpr int kSums = 8;           // enough to hide the latency
constexpr int64_t kFewestSteps = 64;
constexpr double kLongEnough = 4e-3, kPatience = 0.2;
constexpr int64_t kBytes = int64_t{256} << 20;

/// FLOP of a block's step.
constexpr double kMmaFlop = 2.0 * 16 * 8 * 16 * kSums * (kThreads / kWarpSize), kFmaFlop = 2.0 * kSums * kThreads;

template <class T>
__global__ void matrixKernel(int64_t steps, float* out) {
  float sum[kSums][4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int64_t i = 0; i < steps; ++i) {
#pragma unroll
    for (auto& s : sum) mma<T>(s, a, b);
  }
  float all = 0;
#pragma unroll
  for (const auto& s : sum) all += s[0] + s[1] + s[2] + s[3];
  out[threadIndex()] = all;
}

__global__ void fmaKernel(int64_t steps, float* out) {
  float sum[kSums] = {};
  const float x = static_cast<float>(threadIdx.x);
  for (int64_t i = 0; i < steps; ++i) {
#pragma unroll
    for (auto& s : sum) s = fmaf(s, x, 1.0f);
  }
  float all = 0;
#pragma unroll
  for (const float s : sum) all += s;
  out[threadIndex()] = all;
}

__global__ void readKernel(int64_t count, const uint4* from, float* out) {
  uint32_t sum = 0;
  for (int64_t i = threadIndex(); i < count; i += threadCount()) {
    const uint4 v = loadOnce(from + i);
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  out[threadIndex()] = static_cast<float>(sum);
}

template <class F>
double secondsOf(Context& context, F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  context.queue->wait();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The least of several tries.
template <class F>
double leastSeconds(Context& context, F&& f) {
  double least = 1e9;
  for (double spent = 0; spent < kPatience;) {
    const double seconds = secondsOf(context, f);
    least = std::min(least, seconds);
    spent += seconds;
  }
  return least;
}

}  // namespace

void roofline(Context& context, const Roofline& a) {
  auto* out = context.scratch.take<float>(kBlocks * kThreads);
  auto* bytes = context.scratch.take<uint4>(kBytes / static_cast<int64_t>(sizeof(uint4)));
  if (!context.queue) return;
  const auto kernel = a.compute == 0 ? fmaKernel : (a.compute == 1 ? matrixKernel<bf16> : matrixKernel<f16>);
  int64_t steps = kFewestSteps;
  const auto compute = [&] { launch(context, kernel, kBlocks, kThreads, 0, steps, out); };
  while (secondsOf(context, compute) < kLongEnough) steps *= 2;
  const double flop = (a.compute == 0 ? kFmaFlop : kMmaFlop) * static_cast<double>(steps * kBlocks);
  setBytes(context, bytes, 1, kBytes);
  const double computing = leastSeconds(context, compute);
  const double reading = leastSeconds(context, [&] {
    launch(context, readKernel, kBlocks, kThreads, 0, kBytes / static_cast<int64_t>(sizeof(uint4)), bytes, out);
  });
  const float rates[2] = {static_cast<float>(flop / computing / 1e9),
                          static_cast<float>(static_cast<double>(kBytes) / reading / 1e9)};
  context.queue->write(a.rates.data<float>(), rates, sizeof rates);
}

}  // namespace qlora::cuda
