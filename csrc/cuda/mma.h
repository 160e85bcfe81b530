// Matrix instructions, and the loads that feed them: each has a body for the GPU and one for the host.
//
// mma: c += a b, of a 16 x 16 and a 16 x 8 matrix, by one warp. With g = lane / 4 and t = 2 (lane % 4), a lane holds
//   a[0] = A[g, t..t+1]   a[1] = A[g + 8, t..t+1]   a[2] = A[g, t+8..t+9]   a[3] = A[g + 8, t+8..t+9]
//   b[0] = B[t..t+1, g]   b[1] = B[t+8..t+9, g]
//   c[0..1] = C[g, t..t+1]   c[2..3] = C[g + 8, t..t+1]
// where two 16-bit values share a word, the first in its lower half. Sums are fp32, in an order that is the hardware's.
// Compute capability 7.5 has an instruction of half the depth for f16, and none for bf16: there the same is done by
// shuffles and multiply-adds, which is right and slow.
#pragma once

#include <type_traits>

#include "core/dtype.h"
#include "cuda/warp.h"

namespace qlora {

namespace detail {

/// Elements `half` (0 or 1) of a word of two T.
template <class T>
QLORA_DEVICE float halfOf(uint32_t word, int half) {
  return toFloat(T{static_cast<uint16_t>(word >> (16 * half))});
}

/// c += a b where word(lane, r) gives words 0 to 3 of a and 4 to 5 of b of another lane.
template <class T, class Word>
QLORA_DEVICE void mmaByWords(float (&c)[4], Word&& word) {
  const int g = laneIndex() / 4, pair = laneIndex() % 4;
#pragma unroll
  for (int k = 0; k < 8; ++k) {  // pairs of the inner dimension
    const int from = k % 4, upper = k / 4;
    const uint32_t a0 = word(4 * g + from, 2 * upper), a1 = word(4 * g + from, 2 * upper + 1);
    const uint32_t b0 = word(8 * pair + from, 4 + upper), b1 = word(8 * pair + 4 + from, 4 + upper);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      c[0] = fmaf(halfOf<T>(a0, h), halfOf<T>(b0, h), c[0]);
      c[1] = fmaf(halfOf<T>(a0, h), halfOf<T>(b1, h), c[1]);
      c[2] = fmaf(halfOf<T>(a1, h), halfOf<T>(b0, h), c[2]);
      c[3] = fmaf(halfOf<T>(a1, h), halfOf<T>(b1, h), c[3]);
    }
  }
}

#if defined(__CUDACC__)
/// Not inlined: kernels have hundreds of products, each of which would be two hundred instructions.
template <class T>
inline __device__ __noinline__ float4 mmaByShuffles(float4 sums, uint4 a, uint2 b) {
  float c[4] = {sums.x, sums.y, sums.z, sums.w};
  const uint32_t words[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
  mmaByWords<T>(c, [&](int lane, int r) { return shuffle(words[r], lane); });
  return make_float4(c[0], c[1], c[2], c[3]);
}
#endif

}  // namespace detail

/// T is bf16 or f16.
template <class T>
QLORA_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all = emulated::exchange("mma", own, sizeof own);
  detail::mmaByWords<T>(c, [&](int lane, int r) {
    uint32_t value;
    std::memcpy(&value, all + lane * emulated::kPayload + 4 * r, 4);
    return value;
  });
#elif __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (std::is_same_v<T, f16>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  } else {
    const float4 sums = detail::mmaByShuffles<T>(make_float4(c[0], c[1], c[2], c[3]),
                                                 make_uint4(a[0], a[1], a[2], a[3]), make_uint2(b[0], b[1]));
    c[0] = sums.x, c[1] = sums.y, c[2] = sums.z, c[3] = sums.w;
  }
#endif
}

/// Two values in a word, the first in its lower half.
template <class T>
QLORA_DEVICE uint32_t packWord(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return fromFloat<T>(low).bits | static_cast<uint32_t>(fromFloat<T>(high).bits) << 16;
#endif
}

/// Bytes that are read once, and so kept out of the first cache: 1, 2 or 4 words, at a multiple of their size.
template <int words>
QLORA_DEVICE void loadOnce(uint32_t (&to)[words], const void* from) {
  static_assert(words == 1 || words == 2 || words == 4);
  checkAligned(from, 4 * words);
#if !defined(__CUDACC__)
  std::memcpy(to, from, sizeof to);
#else
  if constexpr (words == 1) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  } else if constexpr (words == 2) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  } else {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  }
#endif
}

/// Begins to bring the line of `from` to the second cache, in which other kernels' writes are seen.
QLORA_DEVICE void prefetch([[maybe_unused]] const void* from) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

/// The address of shared memory that instructions take.
QLORA_DEVICE uint32_t sharedAddress(const void* p) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p));
#endif
}

/// Words of shared memory by their offset in bytes. The compiler does not see where it begins, which it would add to
/// each offset in an instruction of its own.
class SharedWords {
 public:
#if defined(__CUDACC__)
  QLORA_DEVICE explicit SharedWords(const void* from) : from_(sharedAddress(from)) { asm volatile("" : "+r"(from_)); }
  QLORA_DEVICE uint32_t operator[](uint32_t offset) const {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from_ + offset));
    return word;
  }

 private:
  uint32_t from_;
#else
  explicit SharedWords(const void* from) : from_(static_cast<const unsigned char*>(from)) {}
  uint32_t operator[](uint32_t offset) const { return *reinterpret_cast<const uint32_t*>(from_ + offset); }

 private:
  const unsigned char* from_;
#endif
};

/// Loads four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix
/// l / 8, 16 bytes at a multiple of 16, and gets of matrix m in r[m] row l / 4, columns 2 (l % 4) and one more; or, if
/// transposed, these of the transposed matrix.
template <bool transposed>
QLORA_DEVICE void loadMatrices(uint32_t (&r)[4], const void* row) {
  checkAligned(row, 16);
#if defined(__CUDACC__)
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(sharedAddress(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(sharedAddress(row))
                 : "memory");
  }
#else
  // The rows themselves are given, since what another lane writes next must not be seen.
  unsigned char own[16];
  std::memcpy(own, row, sizeof own);
  const unsigned char* all = emulated::exchange(transposed ? "ldmatrix.trans" : "ldmatrix", own, sizeof own);
  const int major = laneIndex() / 4, minor = 2 * (laneIndex() % 4);
  for (int m = 0; m < 4; ++m) {
    r[m] = 0;
    for (int h = 0; h < 2; ++h) {
      const int y = transposed ? minor + h : major, x = transposed ? major : minor + h;
      uint16_t element;
      std::memcpy(&element, all + (8 * m + y) * emulated::kPayload + 2 * x, 2);
      r[m] |= uint32_t{element} << (16 * h);
    }
  }
#endif
}

/// Begins to copy 16 bytes from global to shared memory; zeros instead where !valid, and `from` is not read. Both at
/// multiples of 16. They have arrived after commitCopies() and waitForCopies<n>(), for this thread; for others after a
/// barrier, too. On compute capability 7.5 it copies at once.
QLORA_DEVICE void copyAsync16(void* to, const void* from, bool valid = true) {
  checkAligned(to, 16);
  if (valid) checkAligned(from, 16);
#if !defined(__CUDACC__)
  emulated::beginCopy(to, from, valid ? 16 : 0, valid ? 0 : 16);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sharedAddress(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

/// The same of 4 bytes.
QLORA_DEVICE void copyAsync4(void* to, const void* from, bool valid = true) {
  checkAligned(to, 4);
  if (valid) checkAligned(from, 4);
#if !defined(__CUDACC__)
  emulated::beginCopy(to, from, valid ? 4 : 0, valid ? 0 : 4);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(sharedAddress(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
#else
  *static_cast<uint32_t*>(to) = valid ? *static_cast<const uint32_t*>(from) : 0;
#endif
}

/// The copies since the last one are a group.
QLORA_DEVICE void commitCopies() {
#if !defined(__CUDACC__)
  emulated::commitCopies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most the last `groupsLeft` groups are under way.
template <int groupsLeft>
QLORA_DEVICE void waitForCopies() {
#if !defined(__CUDACC__)
  emulated::waitForCopies(groupsLeft);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groupsLeft) : "memory");
#endif
}

}  // namespace qlora
