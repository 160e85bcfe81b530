// What every .cu file starts from. How an operation is written for CUDA:
//
//   csrc/ops/x.h     the contract, which the CPU has already: leave it as it is
//   csrc/ops/x.cu    #include "ops/x.h" and "cuda/device.h"; kernels in an unnamed namespace; the launcher is
//                    qlora::cuda::x(Context&, const X&), of the name in ops/op_table.h. Nothing else is to be
//                    registered: CMake finds the file, and the plugin's table the function. Several of these files are
//                    one to the compiler (plugin.cmake): it says where two of them give a name to different things.
//
// A launcher runs on the stream's thread and only enqueues: launch(context, kernel<T>, grid, threads, sharedBytes,
// arguments...), never <<<>>>. In a rehearsal nothing is launched, but take() of context.scratch must be as in a run.
// Tensors' data are device pointers, which the host may not read (under emulation it crashes): hostValues() has what
// JavaScript wrote, or waits for it. A kernel takes pointers and numbers, 64-bit indices, strides over the grid
// (threadIndex, threadCount) or has a block a row, and is a template of the element type (dispatchFloat). Blocks are
// whole warps. Shared memory: QLORA_SHARED_ARRAY(float, name, count); or dynamicShared<T>() of sharedBytes.
// Arithmetic is fp32 by toFloat and fromFloat, and is not contracted: fmaf where it is to be fused. Sums: warpSum,
// blockSum (fixed trees); no float atomics. Instructions beyond CUDA's C++ have wrappers with a body for the host
// (warp.h, mma.h), since the same file is compiled by g++ for emulation (cuda/emulated), which is how it is tested:
//   npm run build:cuda-emulated && npm run test:cuda
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/dtype.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "cuda/launch.h"
#include "cuda/warp.h"

namespace qlora {

constexpr int kThreads = 256;  // of a block, where nothing speaks for another number

QLORA_DEVICE int64_t threadIndex() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
QLORA_DEVICE int64_t threadCount() { return int64_t{gridDim.x} * blockDim.x; }

/// Blocks of kThreads threads for n items: all at once up to some waves of a large GPU; threads go on over the rest.
inline int64_t blocksFor(int64_t n) {
  constexpr int64_t kMostBlocks = 8192;
  return std::min((n + kThreads - 1) / kThreads, kMostBlocks);
}

/// `count` elements that are loaded and stored at once; at most 16 bytes, and the address a multiple of them.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  static_assert(sizeof(T) * count <= 16);
  T value[count];
};

/// Elements of T in 16 bytes.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <int count, class T>
QLORA_DEVICE Pack<T, count> loadPack(const T* p) {
  checkAligned(p, sizeof(T) * count);
  return *reinterpret_cast<const Pack<T, count>*>(p);
}
template <int count, class T>
QLORA_DEVICE void storePack(T* p, const Pack<T, count>& pack) {
  checkAligned(p, sizeof(T) * count);
  *reinterpret_cast<Pack<T, count>*>(p) = pack;
}

/// The values of a tensor of integers for a launcher to look at: those that JavaScript wrote, without waiting, or else
/// read from the device, for which the queue must drain. In a rehearsal zeros.
inline std::vector<int32_t> hostValues(Context& context, const Tensor& t) {
  std::vector<int32_t> values(static_cast<size_t>(t.size()));
  const size_t bytes = values.size() * sizeof(int32_t);
  if (bytes == 0 || !context.queue) return values;
  if (const auto& copy = t.storage->hostCopy) {
    std::memcpy(values.data(), copy->data(), bytes);
  } else {
    context.queue->read(values.data(), t.storage->data, bytes);
  }
  return values;
}

}  // namespace qlora
