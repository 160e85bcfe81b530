// Reading rows of an operand into the elements that a matmul multiplies: converted or decoded, rounded to the compute
// type.
//
// Two orders. `natural` is the order in memory. `split` deals each group of kGroup columns into kPiles, one after the
// other: into evens and odds, as a byte of two 4-bit weights comes apart, or into four, as a word does. An order of K
// is free if both operands have it. Products of dense operands alone need no groups of K, and so no padding to whole
// ones. Where an engine's last group may be a smaller one (kTail), what is left of K is dealt into that.
#pragma once

#include <algorithm>
#include <bit>

#include "simd/gemm.h"

namespace qlora::QLORA_ISA {

constexpr float kInverse127 = 1.0f / 127.0f;

/// The fp32 scale of a block of a 4-bit weight.
QLORA_INLINE float blockAbsmax(const Weight& w, int64_t block) {
  if (w.absmax.dtype == DType::f32) return w.absmax.data<float>()[block];
  const float scaled =
      w.nestedCode.data<float>()[w.absmax.data<uint8_t>()[block]] * w.nestedAbsmax.data<float>()[block >> 8];
  return scaled + w.offset;
}

/// Whether a product with B wants K in split order.
QLORA_INLINE bool hasSplitOrder(const GemmOperand& b) { return b.weight && b.weight->data.dtype == DType::u8; }

template <class E, class T>
QLORA_INLINE E element(float x) {
  if constexpr (std::is_same_v<E, float>) {
    return toFloat(fromFloat<T>(x));
  } else {
    return fromFloat<E>(x);  // the element is the compute type
  }
}

/// Columns [j, j + n) of row i of a 4-bit weight, natural order.
template <class E>
void readNibbles(const Weight& w, DType compute, int64_t i, int64_t j, int64_t n, E* out) {
  const uint8_t* data = w.data.data<uint8_t>();
  const float* code = w.code.data<float>();
  const int shift = std::countr_zero(static_cast<uint64_t>(w.blockSize));
  dispatchFloat(compute, [&](auto zero) {
    using T = decltype(zero);
    const int64_t begin = i * w.K + j, end = begin + n;
    for (int64_t flat = begin; flat < end;) {
      const int64_t block = flat >> shift, stop = std::min(end, (block + 1) << shift);
      const float absmax = blockAbsmax(w, block);
      E table[16];
      for (int q = 0; q < 16; ++q) table[q] = element<E, T>(code[q] * absmax);
      for (; flat < stop; ++flat) *out++ = table[data[flat >> 1] >> (flat & 1 ? 0 : 4) & 15];
    }
  });
}

/// Columns [j, j + n) of row i, natural order.
template <class E>
void readNatural(const GemmOperand& o, DType compute, int64_t i, int64_t j, int64_t n, E* out) {
  const Weight* w = o.weight;
  if (w && w->data.dtype == DType::u8) return readNibbles(*w, compute, i, j, n, out);
  dispatchFloat(compute, [&](auto zero) {
    using T = decltype(zero);
    if (w && w->data.dtype == DType::i8) {
      const int8_t* q = w->data.data<int8_t>() + i * w->K + j;
      const float absmax = w->absmax.data<float>()[i];
      for (int64_t c = 0; c < n; ++c) out[c] = element<E, T>(static_cast<float>(q[c]) * absmax * kInverse127);
      return;
    }
    const DType dtype = w ? w->data.dtype : o.dtype;
    const void* data = w ? w->data.data<void>() : o.data;
    const int64_t offset = i * (w ? w->K : o.stride) + j;
    if (dtype == DType::i8) {
      const int8_t* q = static_cast<const int8_t*>(data) + offset;
      for (int64_t c = 0; c < n; ++c) out[c] = element<E, T>(static_cast<float>(q[c]));
      return;
    }
    const float scale = o.scale;
    dispatchFloat(dtype, [&](auto source) {
      const auto* x = static_cast<const decltype(source)*>(data) + offset;
      for (int64_t c = 0; c < n; ++c) out[c] = element<E, T>(toFloat(x[c]) * scale);
    });
  });
}

/// The column of a group that comes l-th in split order.
template <int kGroup, int kPiles>
constexpr int splitColumn(int l) {
  return l % (kGroup / kPiles) * kPiles + l / (kGroup / kPiles);
}

/// Columns that n take in split order: whole groups, and at last one of kTail where what is left fits.
template <int kGroup, int kTail>
constexpr int64_t splitColumns(int64_t n) {
  const int64_t left = n % kGroup;
  return n - left + (left == 0 ? 0 : left <= kTail ? kTail : kGroup);
}
/// The same for the groups of an engine.
template <class Engine>
constexpr int64_t splitDepth(int64_t n) {
  return splitColumns<Engine::kGroup, Engine::kTail>(n);
}

/// Columns [j, j + n) of row i in split order, zeros up to the end of the last group. n is at most kMaximum.
template <int kGroup, int kTail, int kPiles, int kMaximum, class E>
void readSplit(const GemmOperand& o, DType compute, int64_t i, int64_t j, int64_t n, E* out) {
  alignas(64) E natural[kMaximum];
  readNatural(o, compute, i, j, n, natural);
  const int64_t padded = splitColumns<kGroup, kTail>(n);
  std::fill(natural + n, natural + padded, E{});
  int64_t g = 0;
  for (; g + kGroup <= padded; g += kGroup) {
    for (int l = 0; l < kGroup; ++l) out[g + l] = natural[g + splitColumn<kGroup, kPiles>(l)];
  }
  if (g == padded) return;
  for (int l = 0; l < kTail; ++l) out[g + l] = natural[g + splitColumn<kTail, kPiles>(l)];
}

}  // namespace qlora::QLORA_ISA
