// AMX: eight registers of 16 rows of 64 bytes (tiles), and an instruction that multiplies two of them into a third.
//
//   C [16, 16] fp32  +=  A [16, 32] bf16  x  B [32, 16] bf16, whose rows lie in pairs of k: [16][16][2]
//
// That is tdpbf16ps, and Intel's manual says what it computes: for each element of C one sum of the products of even k
// and one of those of odd k, both from 0, fused, in the order of k; the two are added, and the result to C. Everything
// rounds to nearest even, subnormal inputs and results count as zeros, and MXCSR is neither asked nor changed.
//
// Kernels are templates over the tiles: the processor's, or emulated ones of the same arithmetic in plain C++, with
// which they are tested where there is no AMX. (One difference is known: a sum that lies below 2^-126 by less than half
// a unit and is rounded up to it is kept by the emulation; a processor may count it as zero, since it looks at the
// exponent with unlimited range.)
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace qlora::QLORA_ISA {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

#if defined(__x86_64__)

/// The processor's tiles. Not through the compiler's intrinsics: gcc's are macros that want the
/// number of a tile as a literal, and do not tell the compiler that memory is read and written.
struct HardwareTiles {
  /// Turns this thread's tiles on, all of full size.
  static void configure() {
    struct {
      uint8_t palette, startRow, reserved[14];
      uint16_t rowBytes[16];
      uint8_t rows[16];
    } all{.palette = 1, .startRow = 0, .reserved = {}, .rowBytes = {}, .rows = {}};
    static_assert(sizeof all == 64);
    for (int t = 0; t < kTiles; ++t) {
      all.rowBytes[t] = kTileBytes;
      all.rows[t] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(all));
  }
  /// Turns them off, so that nobody saves 8 KB of them when threads change.
  static void release() { asm volatile("tilerelease"); }

  template <int T>
  QLORA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  /// Rows lie `stride` bytes apart.
  template <int T>
  QLORA_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
  }
  template <int T>
  QLORA_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
  }
  /// C += A B
  template <int C, int A, int B>
  QLORA_INLINE void multiplyAdd() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#endif

class EmulatedTiles {
 public:
  template <int T>
  QLORA_INLINE void zero() {
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  QLORA_INLINE void load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(tiles_[T][r], static_cast<const char*>(from) + r * stride, kTileBytes);
    }
  }
  template <int T>
  QLORA_INLINE void store(void* to, int64_t stride) const {
    for (int r = 0; r < kTileRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles_[T][r], kTileBytes);
  }
  template <int C, int A, int B>
  void multiplyAdd() {
    for (int m = 0; m < kTileRows; ++m) {
      float even[kWords] = {}, odd[kWords] = {};
      for (int k = 0; k < kWords; ++k) {
        const float a0 = lower(tiles_[A][m][k]), a1 = upper(tiles_[A][m][k]);
        for (int n = 0; n < kWords; ++n) {
          even[n] = flushed(__builtin_fmaf(a0, lower(tiles_[B][k][n]), even[n]));
          odd[n] = flushed(__builtin_fmaf(a1, upper(tiles_[B][k][n]), odd[n]));
        }
      }
      for (int n = 0; n < kWords; ++n) {
        const float sum = flushed(even[n] + odd[n]), c = flushed(std::bit_cast<float>(tiles_[C][m][n]));
        tiles_[C][m][n] = std::bit_cast<uint32_t>(flushed(c + sum));
      }
    }
  }

 private:
  static constexpr int kWords = kTileBytes / 4;

  /// 0 of its sign in place of a subnormal.
  QLORA_INLINE static float flushed(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
  }
  QLORA_INLINE static float lower(uint32_t pair) { return flushed(std::bit_cast<float>(pair << 16)); }
  QLORA_INLINE static float upper(uint32_t pair) { return flushed(std::bit_cast<float>(pair & 0xffff0000)); }

  alignas(64) uint32_t tiles_[kTiles][kTileRows][kWords];
};

}  // namespace qlora::QLORA_ISA
