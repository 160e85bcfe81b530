// Matrix products of a group of four warps (128 threads) on compute capability 9.0: each has a body for that GPU and
// one for the host. Operands lie in shared memory; A may be in registers.
//
//   c[64, n] += a[64, 16] b[16, n]        n is 64, 128 or 256, T is bf16 or f16, sums fp32
//
// Warp w of the group has rows 16 w to 16 w + 15 of c; a lane holds of each of the n / 8 blocks of 8 columns what it
// holds of mma's c, and of an A in registers what it holds of mma's a (mma.h).
//
// The hardware takes an operand by a descriptor: where it starts, how far apart its 8 x 8 blocks lie, and that within
// each 1024 bytes of memory the 16-byte pieces are swapped: bits 4 to 6 of an address are xored with bits 7 to 9. That
// is how tile.h swaps them where rows are 128 bytes and a tile begins at a multiple of 1024. Two forms:
//
//   inner       rows of 64 elements along k; 8 rows are 1024 bytes, one after another
//   not inner   rows of 64 elements along n, one a k; 8 rows are 1024 bytes, one after another; the next 64 n
//               begin `leading` bytes further
//
// Products are begun, and go on beside what their threads do then:
//
//   beginGroup()  multiplyGroup(..) ..  commitGroup()     what these read and add to may not be touched
//   waitForGroups<left>(c)                                c may be, which none but the last `left` of commits adds to
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
  int offset = 0;  // bytes beyond start, where products of one start differ in that

#if defined(__CUDACC__)
  QLORA_DEVICE uint64_t descriptor() const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return kSwizzle128 | uint64_t{kSwizzledBytes >> 4} << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
           ((sharedAddress(start) & 0x3ffff) >> 4) + static_cast<uint64_t>(offset >> 4);
  }
#else
  /// Element (i, k), as the hardware finds it.
  template <class T>
  float at(int i, int k) const {
    const auto from = reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(offset);
    const int along = inner ? k : i, across = inner ? i : k;
    const uintptr_t address = from + static_cast<uintptr_t>(along / 64 * leading + across / 8 * kSwizzledBytes +
                                                            across % 8 * 128 + along % 64 * 2);
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address ^ ((address >> 3) & 0x70)), sizeof value);
    return toFloat(value);
  }
#endif
};

/// What this thread has written to shared memory is there for products that are begun after a barrier.
QLORA_DEVICE void showToGroups() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Before the first product after c was touched otherwise.
QLORA_DEVICE void beginGroup() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Waits until at most the last `left` commits are under way; c, to which none of those adds, may then be touched.
template <int left, int blocks>
QLORA_DEVICE void waitForGroups(float (&c)[blocks][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#pragma unroll
  for (auto& block : c) {
#pragma unroll
    for (float& x : block) asm volatile("" : "+f"(x)::"memory");
  }
#else
  static_cast<void>(c);
#endif
}

/// All commits but the last have ended: nobody reads their operands any more. What c has may not yet be touched.
QLORA_DEVICE void waitForOperands() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
}

QLORA_DEVICE void commitGroup() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_C4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define QLORA_C16(i) QLORA_C4(i), QLORA_C4(i + 1), QLORA_C4(i + 2), QLORA_C4(i + 3)
#define QLORA_SUMS64                                                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define QLORA_SUMS128                                                                                         \
  QLORA_SUMS64                                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63"
#define QLORA_SUMS256                                                                                    \
  QLORA_SUMS128                                                                                          \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88" \
  ",%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110"  \
  ",%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
/// `operands` are a, b, whether c is added to, two signs and what is transposed.
#define QLORA_WGMMA(n, type, operands, ...)                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" QLORA_SUMS##n "}, " operands ";" \
               : __VA_ARGS__:QLORA_INPUTS                                                                            \
               : "memory")
#define QLORA_WGMMA64(operands)                                    \
  if constexpr (std::is_same_v<T, bf16>) {                         \
    QLORA_WGMMA(64, "bf16", operands, QLORA_C16(0), QLORA_C16(4)); \
  } else {                                                         \
    QLORA_WGMMA(64, "f16", operands, QLORA_C16(0), QLORA_C16(4));  \
  }
#define QLORA_WGMMA128(operands)                                                                 \
  if constexpr (std::is_same_v<T, bf16>) {                                                       \
    QLORA_WGMMA(128, "bf16", operands, QLORA_C16(0), QLORA_C16(4), QLORA_C16(8), QLORA_C16(12)); \
  } else {                                                                                       \
    QLORA_WGMMA(128, "f16", operands, QLORA_C16(0), QLORA_C16(4), QLORA_C16(8), QLORA_C16(12));  \
  }
#define QLORA_WGMMA256(operands)                                                                               \
  if constexpr (std::is_same_v<T, bf16>) {                                                                     \
    QLORA_WGMMA(256, "bf16", operands, QLORA_C16(0), QLORA_C16(4), QLORA_C16(8), QLORA_C16(12), QLORA_C16(16), \
                QLORA_C16(20), QLORA_C16(24), QLORA_C16(28));                                                  \
  } else {                                                                                                     \
    QLORA_WGMMA(256, "f16", operands, QLORA_C16(0), QLORA_C16(4), QLORA_C16(8), QLORA_C16(12), QLORA_C16(16),  \
                QLORA_C16(20), QLORA_C16(24), QLORA_C16(28));                                                  \
  }
#elif !defined(__CUDACC__)
namespace detail {

/// c += a b of the host, of rows g and g + 8 of a; fresh: c is 0 before.
template <class T, bool fresh, bool innerB, int blocks>
void multiplyRows(float (&c)[blocks][4], const float (&a)[2][16], const GroupOperand<innerB>& b) {
  for (int j = 0; j < blocks; ++j) {
    for (int e = 0; e < 4; ++e) {
      float& sum = c[j][e];
      if (fresh) sum = 0;
      const int column = 8 * j + laneIndex() % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k) sum = std::fma(a[e / 2][k], b.template at<T>(column, k), sum);
    }
  }
}

}  // namespace detail
#endif

/// Begins c += a b; fresh: c = a b. blocks: n / 8.
template <class T, bool innerB, bool fresh = false, int blocks>
QLORA_DEVICE void multiplyGroup(float (&c)[blocks][4], const GroupOperand<true>& a, const GroupOperand<innerB>& b) {
  static_assert(blocks == 8 || blocks == 16 || blocks == 32);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_INPUTS "l"(a.descriptor()), "l"(b.descriptor()), "n"(fresh ? 0 : 1), "n"(innerB ? 0 : 1)
  if constexpr (blocks == 8) {
    QLORA_WGMMA64("%32, %33, %34, 1, 1, 0, %35")
  } else if constexpr (blocks == 16) {
    QLORA_WGMMA128("%64, %65, %66, 1, 1, 0, %67")
  } else {
    QLORA_WGMMA256("%128, %129, %130, 1, 1, 0, %131")
  }
#undef QLORA_INPUTS
#elif !defined(__CUDACC__)
  float rows[2][16];
  for (int h = 0; h < 2; ++h) {
    const int row = warpIndex() % 4 * 16 + laneIndex() / 4 + 8 * h;
    for (int k = 0; k < 16; ++k) rows[h][k] = a.template at<T>(row, k);
  }
  detail::multiplyRows<T, fresh>(c, rows, b);
#endif
}

/// The same with A in registers, which hold what they hold of mma's a.
template <class T, bool innerB, int blocks>
QLORA_DEVICE void multiplyGroup(float (&c)[blocks][4], const uint32_t (&a)[4], const GroupOperand<innerB>& b) {
  static_assert(blocks == 8 || blocks == 16);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "n"(innerB ? 0 : 1)
  if constexpr (blocks == 8) {
    QLORA_WGMMA64("{%32,%33,%34,%35}, %36, 1, 1, 1, %37")
  } else {
    QLORA_WGMMA128("{%64,%65,%66,%67}, %68, 1, 1, 1, %69")
  }
#undef QLORA_INPUTS
#elif !defined(__CUDACC__)
  const unsigned char* all = emulated::exchange("wgmma", a, sizeof a);
  float rows[2][16];
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 16; ++k) {
      // Word h + 2 (k / 8) of the lane that holds columns k and k + 1 or k - 1 of this row.
      T value;
      std::memcpy(&value,
                  all + (laneIndex() / 4 * 4 + k % 8 / 2) * emulated::kPayload + 4 * (h + k / 8 * 2) + k % 2 * 2, 2);
      rows[h][k] = toFloat(value);
    }
  }
  detail::multiplyRows<T, false>(c, rows, b);
#endif
}

}  // namespace qlora
