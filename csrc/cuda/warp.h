// What the threads of a warp and of a block do together: barriers, exchange of registers, sums in fixed trees.
// Every lane of a warp must come to a warp's operation, every thread of a block to a block's.
#pragma once

#include "cuda/launch.h"

namespace qlora {

constexpr int kWarpSize = 32;

QLORA_DEVICE void syncBlock() {
#if defined(__CUDACC__)
  __syncthreads();
#else
  emulated::syncThreads();
#endif
}

QLORA_DEVICE void syncWarp() {
#if defined(__CUDACC__)
  __syncwarp();
#else
  const char nothing = 0;
  emulated::exchange("syncWarp", &nothing, 1);
#endif
}

QLORA_DEVICE int laneIndex() { return static_cast<int>(threadIdx.x % kWarpSize); }
QLORA_DEVICE int warpIndex() { return static_cast<int>(threadIdx.x / kWarpSize); }

/// The value of lane `source`. T of 4 or 8 bytes.
template <class T>
QLORA_DEVICE T shuffle(T value, int source) {
#if defined(__CUDACC__)
  return __shfl_sync(0xffffffffu, value, source);
#else
  T result;
  std::memcpy(&result, emulated::exchange("shuffle", &value, sizeof value) + (source & 31) * emulated::kPayload,
              sizeof result);
  return result;
#endif
}

/// The value of lane (own ^ mask).
template <class T>
QLORA_DEVICE T shuffleXor(T value, int mask) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  T result;
  std::memcpy(&result,
              emulated::exchange("shuffleXor", &value, sizeof value) +
                  ((emulated::laneOfThread() ^ mask) & 31) * emulated::kPayload,
              sizeof result);
  return result;
#endif
}

/// Bit l: whether lane l's condition holds.
QLORA_DEVICE unsigned ballot(bool condition) {
#if defined(__CUDACC__)
  return __ballot_sync(0xffffffffu, condition);
#else
  const unsigned char own = condition;
  const unsigned char* all = emulated::exchange("ballot", &own, 1);
  unsigned bits = 0;
  for (int l = 0; l < kWarpSize; ++l) bits |= static_cast<unsigned>(all[l * emulated::kPayload]) << l;
  return bits;
#endif
}

/// combine(.., ..) of all lanes' values, in every lane; the same bits in each, since a butterfly adds the same pairs.
template <class T, class Combine>
QLORA_DEVICE T warpReduce(T value, Combine combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = combine(value, shuffleXor(value, mask));
  return value;
}

struct Sum {
  template <class T>
  QLORA_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  QLORA_DEVICE T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

QLORA_DEVICE float warpSum(float value) { return warpReduce(value, Sum{}); }
QLORA_DEVICE float warpMax(float value) { return warpReduce(value, Largest{}); }

/// The same over a block of one dimension, in every thread. `neutral` is what combine leaves a value as it is with.
/// Begins and ends with a barrier's worth of order: it may be called again at once.
template <class T, class Combine>
QLORA_DEVICE T blockReduce(T value, T neutral, Combine combine) {
  QLORA_SHARED_ARRAY(T, ofWarps, kWarpSize);
  value = warpReduce(value, combine);
  if (laneIndex() == 0) ofWarps[warpIndex()] = value;
  syncBlock();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = warpReduce(laneIndex() < warps ? ofWarps[laneIndex()] : neutral, combine);
  syncBlock();
  return value;
}

QLORA_DEVICE float blockSum(float value) { return blockReduce(value, 0.0f, Sum{}); }
QLORA_DEVICE float blockMax(float value) { return blockReduce(value, -INFINITY, Largest{}); }

/// Memory of the block whose size the launch says; aligned to 128 bytes.
template <class T>
QLORA_DEVICE T* dynamicShared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char qloraDynamicShared[];
  return reinterpret_cast<T*>(qloraDynamicShared);
#else
  return static_cast<T*>(emulated::dynamicShared());
#endif
}

/// Of an access that is wider than its elements. A GPU would stop the kernel.
QLORA_DEVICE void checkAligned([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    emulated::complain("an access of %zu bytes at %p is not aligned", bytes, p);
#endif
}

}  // namespace qlora
