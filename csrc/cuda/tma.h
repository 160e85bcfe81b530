// Tiles that compute capability 9.0 copies by itself: a thread says which, and the bytes arrive in shared memory while
// nobody computes addresses (cp.async.bulk.tensor). Each wrapper has a body for the GPU and one for the host.
//
// A TensorMap describes a matrix of 16-bit elements in rows. A tile of it is `boxRows` rows of 64 columns, 128 bytes,
// which arrive as wgmma.h wants them: 16-byte pieces swapped within each 1024 bytes, where the tile must begin. Beyond
// the matrix it has zeros.
//
// A Barrier lies in shared memory and goes from phase to phase: one has ended when as many threads have arrived as
// it was made for, and as many bytes as they said they expect. wait(parity) is for the end of the phase of that parity;
// phases count from 0, so that wait(1) of a new one returns at once.
#pragma once

#include "cuda/mma.h"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace qlora::cuda {

constexpr int kBoxColumns = 64;

#if defined(__CUDACC__)

struct TensorMap {
  CUtensorMap map;
};

/// Rows of `stride` elements, data and rows at multiples of 16 bytes.
inline TensorMap tensorMapOf(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t stride,
                             int boxRows) {
  // The plugin links no driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    checkCuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
              "asking the driver for tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  TensorMap result;
  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(boxRows)}, steps[] = {1, 1};
  const CUresult status =
      encode(&result.map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), dimensions, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail("ERR_QLORA_DEVICE", "CUDA: describing a matrix [%lld, %lld] failed: error %d", static_cast<long long>(rows),
         static_cast<long long>(columns), static_cast<int>(status));
  }
  return result;
}

#else

struct TensorMap {
  const void* data;
  int64_t rows, columns, stride;
  int boxRows;
};

inline TensorMap tensorMapOf(const void* data, DType, int64_t rows, int64_t columns, int64_t stride, int boxRows) {
  checkAligned(data, 16);
  if (stride % 8) fail("ERR_QLORA_DEVICE", "a tensor map of rows that are no multiple of 16 bytes");
  return {data, rows, columns, stride, boxRows};
}

#endif

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 900

struct Barrier {
#if defined(__CUDACC__)
  uint64_t state;

  QLORA_DEVICE void init(int threads) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(&state)), "r"(threads) : "memory");
  }
  QLORA_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(&state)) : "memory");
  }
  /// Arrives, and so many bytes are still to come.
  QLORA_DEVICE void arriveExpecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(&state)), "r"(bytes)
                 : "memory");
  }
  QLORA_DEVICE void wait(int parity) {
    uint32_t ended;
    do {
      asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(ended)
                   : "r"(sharedAddress(&state)), "r"(parity)
                   : "memory");
    } while (!ended);
  }
#else
  int threads, arrived, phase;
  int64_t bytes;

  void init(int count) { *this = {count, 0, 0, 0}; }
  void arrive() { arriveExpecting(0); }
  void arriveExpecting(int expected) {
    bytes += expected;
    if (++arrived > threads) emulated::complain("more threads arrive at a barrier than it is for");
    advance();
  }
  void receive(int count) {
    bytes -= count;
    advance();
  }
  void wait(int parity) {
    emulated::waitUntil(this, [&] { return (phase & 1) != parity; });
  }

 private:
  void advance() {
    if (arrived < threads || bytes != 0) return;
    arrived = 0;
    ++phase;
  }
#endif
};

/// After init(), by the thread that did it, before the block's barrier that shows it to others.
QLORA_DEVICE void showBarriers() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Begins to copy the tile at (row, column), which `barrier` will have received. By one thread.
template <class T>
QLORA_DEVICE void copyBox(T* to, const TensorMap& from, int64_t row, int64_t column, Barrier& barrier) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          sharedAddress(to)),
      "l"(&from.map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "r"(sharedAddress(&barrier.state))
      : "memory");
#else
  checkAligned(to, 1024);
  emulated::whenWaited(&barrier, [=, &barrier] {
    for (int r = 0; r < from.boxRows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t y = row + r, x = column + c;
        const bool within = y < from.rows && x < from.columns;
        to[r * kBoxColumns + ((c / 8) ^ (r % 8)) * 8 + c % 8] =
            within ? static_cast<const T*>(from.data)[y * from.stride + x] : T{};
      }
    }
    barrier.receive(from.boxRows * kBoxColumns * static_cast<int>(sizeof(T)));
  });
#endif
}

#endif

/// Registers that this warp may use from here on; by all warps of a group, together as many as a block has.
template <int count>
QLORA_DEVICE void giveUpRegisters() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
QLORA_DEVICE void takeRegisters() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

}  // namespace qlora::cuda
