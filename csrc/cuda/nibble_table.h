// Decoding 4-bit weights without a multiplication a weight.
//
// A block of weights has 16 possible values, so a thread that decodes 32 or more of a block makes the table of them
// first: value[c] = round_T(code[c] * absmax), for T of 16 bits. It keeps the table in eight registers as two planes, of
// lower and of upper bytes, since the instruction `prmt` picks four bytes at once out of eight by four numbers of three
// bits each, which 4-bit codes nearly are: for four codes, a pick in the lower half of a plane, one in the upper half,
// and a third that takes for each code the one that its fourth bit says; then lower and upper bytes are interleaved.
// That is 2.6 instructions a weight, none of which asks memory.
#pragma once

#include "cuda/device.h"

namespace qlora::cuda {

/// T is bf16 or f16.
template <class T>
struct NibbleTable {
  uint32_t lower[4], upper[4];  // byte c % 4 of word c / 4 is of value c

  /// code [16] at a multiple of 16 bytes.
  QLORA_DEVICE NibbleTable(const float* code, float absmax) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto c = loadPack<4>(code + 4 * i);
      uint32_t word[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        word[h] = uint32_t{fromFloat<T>(c.value[2 * h] * absmax).bits} |
                  uint32_t{fromFloat<T>(c.value[2 * h + 1] * absmax).bits} << 16;
      }
      lower[i] = __byte_perm(word[0], word[1], 0x6420);
      upper[i] = __byte_perm(word[0], word[1], 0x7531);
    }
  }

  /// The eight weights of four bytes, in their order: two a word.
  QLORA_DEVICE void decode(uint32_t packed, uint32_t (&weights)[4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t codes = packed >> (16 * h);
      const uint32_t within = codes & 0x7777, half = ((codes >> 1) & 0x4444) | 0x3210;
      const auto pick = [&](const uint32_t(&plane)[4]) {
        return __byte_perm(__byte_perm(plane[0], plane[1], within), __byte_perm(plane[2], plane[3], within), half);
      };
      const uint32_t low = pick(lower), up = pick(upper);
      // The even element of a byte is in its upper nibble.
      weights[2 * h] = __byte_perm(low, up, 0x4051);
      weights[2 * h + 1] = __byte_perm(low, up, 0x6273);
    }
  }
};

}  // namespace qlora::cuda
