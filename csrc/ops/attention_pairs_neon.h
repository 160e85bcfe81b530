// Attention's pairs of bf16 for ARMv8.6: bfdot adds the two products of each pair to an fp32 lane.
#pragma once

#include "ops/attention_vector.h"

namespace qlora::QLORA_ISA::attention {

/// Elements are pairs of bf16 values. The products are summed in fp32.
struct BFloat16Pairs {
  using Element = uint32_t;
  using Lanes = bfloat16x8_t;
  static constexpr bool kOnTiles = false;
  struct Session {};
  static constexpr int kPack = 2;

  QLORA_INLINE static Element element(bf16 first, bf16 second) {
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
  }
  QLORA_INLINE static Lanes lanes(const Element* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
  QLORA_INLINE static Lanes broadcast(const Element* p) { return vreinterpretq_bf16_u32(vdupq_n_u32(*p)); }
  QLORA_INLINE static Vec multiplyAdd(Lanes a, Lanes b, Vec c) { return vbfdotq_f32(c, a, b); }
  QLORA_INLINE static void storeAlongLanes(Element* p, Vec a, Vec b) {
    vst1q_u32(p, vreinterpretq_u32_u16(converted(a, b)));
  }
  QLORA_INLINE static void storeAlongRows(Element* p, const Vec* rows) {
    const uint16x8_t x = converted(rows[0], rows[1]);
    vst1q_u32(p, vreinterpretq_u32_u16(vzip1q_u16(x, vextq_u16(x, x, 4))));
  }

 private:
  QLORA_INLINE static uint16x8_t converted(Vec low, Vec high) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
  }
};

}  // namespace qlora::QLORA_ISA::attention
