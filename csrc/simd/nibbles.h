// The parts of a 4-bit weight with their pointers at hand, for loops that decode a group of 64 weights in a few cycles.
#pragma once

#include <bit>

#include "ops/weight.h"
#include "simd/vector.h"

namespace qlora::QLORA_ISA {

/// How the scales of the blocks are stored: as fp32, or in 8 bits with scales of their own (double quantization).
enum class AbsmaxKind { plain, nested };

struct Nibbles {
  const uint8_t* data;
  const float* code;
  const float* absmax;  // null with double quantization, which has the next three
  const uint8_t* absmaxCode;
  const float* nestedAbsmax;
  const float* nestedCode;
  float offset;
  int shift;  // blocks of 1 << shift
  int64_t K;

  explicit Nibbles(const Weight& w)
      : data(w.data.data<uint8_t>()),
        code(w.code.data<float>()),
        absmax(w.absmax.dtype == DType::f32 ? w.absmax.data<float>() : nullptr),
        absmaxCode(absmax ? nullptr : w.absmax.data<uint8_t>()),
        nestedAbsmax(w.nestedAbsmax.dataOrNull<float>()),
        nestedCode(w.nestedCode.dataOrNull<float>()),
        offset(w.offset),
        shift(std::countr_zero(static_cast<uint64_t>(w.blockSize))),
        K(w.K) {}

  template <AbsmaxKind kind>
  QLORA_INLINE float scale(int64_t block) const {
    if constexpr (kind == AbsmaxKind::plain) return absmax[block];
    const float scaled = nestedCode[absmaxCode[block]] * nestedAbsmax[block >> 8];
    return scaled + offset;
  }
};

/// Whether groups of 2 * kVector lie in one block each and begin at a byte.
QLORA_INLINE bool hasVectorGroups(const Weight& w) { return w.data.dtype == DType::u8 && w.K % (2 * kVector) == 0; }

}  // namespace qlora::QLORA_ISA
