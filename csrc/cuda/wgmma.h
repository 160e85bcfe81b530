// Matrix products of a group of four warps (128 threads) on compute capability 9.0, whose operands both lie in shared
// memory: each has a body for that GPU and one for the host.
//
//   c[64, N] += a[64, 16] b[16, N]        T is bf16 or f16, sums fp32; N is 128 or 256
//
// Warp w of the group has rows 16 w to 16 w + 15 of c; a lane holds of each block of 8 columns what it holds of mma's c
// (mma.h).
//
// The hardware takes an operand by a descriptor: where it starts, how far apart its 8 x 8 blocks lie, and that within
// each 1024 bytes of memory the 16-byte pieces are swapped: bits 4 to 6 of an address are xored with bits 7 to 9. That
// is how tile.h swaps them where rows are 128 bytes and a tile begins at a multiple of 1024. Two forms:
//
//   inner       rows of 64 elements along k; 8 rows are 1024 bytes, one after another
//   not inner   rows of 64 elements along n, one a k; 8 rows are 1024 bytes, one after another; the next 64 n
//               begin `leading` bytes further
#pragma once

#include "cuda/mma.h"

namespace qlora::cuda {

constexpr int kGroupThreads = 128, kGroupRows = 64;
constexpr int kSwizzledBytes = 1024;

/// Where not, for other GPUs or for some that are not known yet, nothing here does anything, and mma takes its place.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

template <bool inner>
struct GroupOperand {
  const void* start;
  int leading = 0;

#if defined(__CUDACC__)
  QLORA_DEVICE uint64_t descriptor() const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | uint64_t{kSwizzledBytes >> 4} << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
           (sharedAddress(start) & 0x3ffff) >> 4;
  }
#else
  /// Element (i, k), as the hardware finds it.
  template <class T>
  float at(int i, int k) const {
    const auto from = reinterpret_cast<uintptr_t>(start);
    const int along = inner ? k : i, across = inner ? i : k;
    const uintptr_t address = from + static_cast<uintptr_t>(along / 64 * leading + across / 8 * kSwizzledBytes +
                                                            across % 8 * 128 + along % 64 * 2);
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address ^ ((address >> 3) & 0x70)), sizeof value);
    return toFloat(value);
  }
#endif
};

/// Before the first product after c was touched otherwise.
QLORA_DEVICE void beginGroup() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// All products begun have ended when this returns; c may be touched.
template <int n8>
QLORA_DEVICE void endGroups(float (&c)[n8][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (auto& block : c) {
#pragma unroll
    for (float& x : block) asm volatile("" : "+f"(x)::"memory");
  }
#else
  static_cast<void>(c);
#endif
}

/// The products begun since the last one are a group.
QLORA_DEVICE void commitGroup() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// All groups but the last have ended: nobody reads their operands any more.
QLORA_DEVICE void endGroupsButLast() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_C4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define QLORA_C32(i)                                                                                                 \
  QLORA_C4(i), QLORA_C4(i + 1), QLORA_C4(i + 2), QLORA_C4(i + 3), QLORA_C4(i + 4), QLORA_C4(i + 5), QLORA_C4(i + 6), \
      QLORA_C4(i + 7)
#define QLORA_WGMMA_128(type)                                                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                       \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
               "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"     \
               "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, %66;"         \
               : QLORA_C32(0), QLORA_C32(8)                                                                       \
               : "l"(a.descriptor()), "l"(b.descriptor()), "n"(innerB ? 0 : 1)                                    \
               : "memory")
#define QLORA_WGMMA_256(type)                                                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                       \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
               "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"     \
               "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"     \
               "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,"     \
               "%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,"  \
               "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, %130;" \
               : QLORA_C32(0), QLORA_C32(8), QLORA_C32(16), QLORA_C32(24)                                         \
               : "l"(a.descriptor()), "l"(b.descriptor()), "n"(innerB ? 0 : 1)                                    \
               : "memory")
#endif

/// Begins c += a b. Nothing that it reads or c may be touched until it has ended.
template <class T, bool innerB, int n8>
QLORA_DEVICE void multiplyGroup(float (&c)[n8][4], const GroupOperand<true>& a, const GroupOperand<innerB>& b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (n8 == 32) {
    if constexpr (std::is_same_v<T, bf16>) {
      QLORA_WGMMA_256("bf16");
    } else {
      QLORA_WGMMA_256("f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bf16>) {
      QLORA_WGMMA_128("bf16");
    } else {
      QLORA_WGMMA_128("f16");
    }
  }
#elif !defined(__CUDACC__)
  const int row = warpIndex() % 4 * 16 + laneIndex() / 4, column = laneIndex() % 4 * 2;
  for (int h = 0; h < 2; ++h) {
    float ofA[16];
    for (int k = 0; k < 16; ++k) ofA[k] = a.template at<T>(row + 8 * h, k);
    for (int j = 0; j < n8; ++j) {
      for (int e = 0; e < 2; ++e) {
        float& sum = c[j][2 * h + e];
        for (int k = 0; k < 16; ++k) sum = std::fma(ofA[k], b.template at<T>(8 * j + column + e, k), sum);
      }
    }
  }
#endif
}

}  // namespace qlora::cuda
