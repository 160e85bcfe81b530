// What nvcc adds to C++, for a compiler of the host: the plugin's sources compile with this into
// libqlora_cuda_emulated.so, whose kernels run on the CPU (engine.h), so that tests run them where there is no GPU.
//
// What it does not show: races between threads that a barrier separates only by luck of the order (QLORA_CUDA_SEED
// changes it), the cost of anything, and what the hardware leaves undefined.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define QLORA_VECTOR_TYPE(name, T)                                           \
  struct __align__(4 * sizeof(T)) name##4 {                                  \
    T x, y, z, w;                                                            \
  };                                                                         \
  struct __align__(2 * sizeof(T)) name##2 {                                  \
    T x, y;                                                                  \
  };                                                                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; } \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }
QLORA_VECTOR_TYPE(float, float)
QLORA_VECTOR_TYPE(int, int)
QLORA_VECTOR_TYPE(uint, unsigned)
#undef QLORA_VECTOR_TYPE

// Functions of nvcc's that kernels use.
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = (uint64_t{y} << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>((both >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
  return result;
}
using std::max;
using std::min;
