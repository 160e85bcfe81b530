// The tables of 4-bit and 8-bit quantization, bit for bit those of bitsandbytes.
//
// 4 bits: a value x in [-1, 1] takes the code whose thresholds enclose it; a tie takes the lower side (strict `>`).
//   NF4  16 quantiles of the normal distribution (Dettmers et al., "QLoRA", 2023); thresholds are fp32 midpoints.
//   FP4  sign, two bits of exponent, one of mantissa, over 12; thresholds on |x| as bitsandbytes' CUDA kernel has them.
//
// 8 bits: a dynamic map of 256 values (Dettmers, "8-bit approximations", 2016), signed or unsigned: decades 10^-6 to 1,
// each with twice as many evenly spaced values as the one below. x takes the nearest value, a tie the even index.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace qlora {

enum class FourBitType : int { nf4, fp4 };

inline constexpr float kNf4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

/// Code 8 would be -0; the table that is written to files holds +0.
inline constexpr float kFp4Code[16] = {
    0.0f, 0.0625f / 12,  8.0f / 12,  12.0f / 12,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

constexpr const float* fourBitCode(FourBitType type) { return type == FourBitType::nf4 ? kNf4Code : kFp4Code; }

struct Thresholds {
  float value[15];
  int count;
};

constexpr Thresholds nf4Thresholds() {
  Thresholds t{{}, 15};
  for (int i = 0; i < 15; ++i) t.value[i] = (kNf4Code[i] + kNf4Code[i + 1]) / 2;
  return t;
}

inline constexpr Thresholds kNf4Thresholds = nf4Thresholds();  // of x
inline constexpr Thresholds kFp4Thresholds = {                 // of |x|
    {.00260417f, .0859375f, .20833333f, .29166667f, .4166667f, .583333f, .8333333f},
    7};

/// The FP4 code of the c-th magnitude in rising order, c in [0, 8): 0 1 6 7 4 5 2 3.
constexpr int32_t fp4CodeOfRank(int32_t c) { return (-(c & 6) & 6) | (c & 1); }

/// The 4-bit code of x in [-1, 1].
template <FourBitType type>
QLORA_SHARED int32_t fourBitIndex(float x) {
  constexpr Thresholds thresholds = type == FourBitType::nf4 ? kNf4Thresholds : kFp4Thresholds;
  const float key = type == FourBitType::nf4 || x >= 0 ? x : -x;
  int32_t rank = 0;
  for (int t = 0; t < thresholds.count; ++t) rank += key > thresholds.value[t] ? 1 : 0;
  return type == FourBitType::nf4 ? rank : fp4CodeOfRank(rank) | (x < 0 ? 8 : 0);
}

enum class DynamicMapKind : int { signedMap, unsignedMap };

/// A dynamic map and what finding the nearest value needs: x takes index i where threshold[i - 1] < x <= threshold[i].
/// The 7 leading bits of x's mantissa with its exponent leave at most one threshold in doubt: `first` says which.
struct DynamicMap {
  static constexpr int32_t kLowestKey = (127 - 23) << 7;  // of 2^-23: below every threshold but the two around 0
  static constexpr int32_t kHighestKey = 127 << 7;        // of 1
  static constexpr int kKeys = kHighestKey - kLowestKey + 2;

  float code[256];
  float threshold[256];     // the last is infinite
  uint8_t first[2][kKeys];  // [x < 0][key]
};

const DynamicMap& dynamicMap(DynamicMapKind kind);

}  // namespace qlora
