// Element types, and the two 16-bit floating-point formats with their roundings.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace qlora {

enum class DType : uint8_t { f32, bf16, f16, i32, u8, i8 };

constexpr const char* kDTypeNames[] = {"f32", "bf16", "f16", "i32", "u8", "i8"};
constexpr size_t kDTypeSizes[] = {4, 2, 2, 4, 1, 1};

constexpr const char* name(DType t) { return kDTypeNames[static_cast<int>(t)]; }
constexpr size_t sizeOf(DType t) { return kDTypeSizes[static_cast<int>(t)]; }
constexpr bool isFloat(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }

#define QLORA_INLINE inline __attribute__((always_inline))
/// Of functions that CUDA's kernels share with the CPU's.
#if defined(__CUDACC__)
#define QLORA_SHARED __host__ __device__ QLORA_INLINE
#else
#define QLORA_SHARED QLORA_INLINE
#endif

/// The upper half of an fp32.
struct bf16 {
  uint16_t bits;
};

/// IEEE binary16.
struct f16 {
  uint16_t bits;
};

QLORA_SHARED float toFloat(float x) { return x; }
QLORA_SHARED float toFloat(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

/// Exact, subnormals and NaN included. Branch-free, so that loops over it vectorize.
QLORA_SHARED float toFloat(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#elif defined(__aarch64__)
  return static_cast<float>(std::bit_cast<__fp16>(x));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // Exponent and mantissa moved into place and rescaled by 2^112, which also normalizes subnormals.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u | (magnitude << 13) : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(sign | special);
#endif
}

template <class T>
QLORA_SHARED T fromFloat(float x);

template <>
QLORA_SHARED float fromFloat<float>(float x) {
  return x;
}

/// Round to nearest even; subnormal results are kept, NaN stays NaN.
template <>
QLORA_SHARED bf16 fromFloat<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40;
  return {static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
#endif
}

/// Round to nearest even; overflow becomes infinity, subnormal results are kept.
template <>
QLORA_SHARED f16 fromFloat<f16>(float x) {
#if defined(__CUDA_ARCH__)
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#elif defined(__aarch64__)
  return std::bit_cast<f16>(static_cast<__fp16>(x));
#else
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t a = u & 0x7fffffff;
  // Normal results: rebias the exponent by 127 - 15, then round the 13 dropped bits.
  const uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 aligns the mantissa so that the addition itself rounds.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000;
  uint32_t h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above round to infinity
  h = a > 0x7f800000 ? 0x7e00 : h;
  return {static_cast<uint16_t>(sign | h)};
#endif
}

/// Calls f with a value of the C++ type behind a floating-point dtype: dispatch(t, [&](auto zero) { using T = ... });
template <class F>
QLORA_INLINE void dispatchFloat(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

}  // namespace qlora
