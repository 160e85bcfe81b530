// The engine on ARMv8.6's bf16 matrix instruction. bfmmla multiplies 2 rows by 2 lanes over 4 steps of k: sixteen
// products, where fmla makes four. So k comes in fours, rows in pairs, and a strip is [k / 4][lane][4].
//
// A table of bf16 is two planes of bytes (nibble_table_neon.h); what they look up is what is multiplied, unwidened.
#pragma once

#include "simd/gemm_engine.h"
#include "simd/nibble_table_neon.h"

namespace qlora::QLORA_ISA {

struct Bf16Engine {
  using Element = bf16;
  static constexpr int kDepth = 4, kGroup = 32, kTail = kGroup, kLanesUnit = kGroup, kStrip = 2 * kVector;
  static constexpr int kRows = 12, kRowUnit = 1, kChunk = 512, kStride = kChunk + 32, kDecoded = 128;
  // Rows that a decoder asks memory for ahead of their turn.
  static constexpr int kAheadRows = 4, kAheadLanes = 16;
  struct Session {};

  /// Rows [i, i + rows), columns [j, j + n), in split order, `stride` apart.
  static void rowsSplit(const GemmOperand& o, DType compute, int64_t i, int64_t rows, int64_t j, int64_t n, bf16* out,
                        int64_t stride) {
    if (hasGroups(o)) {
      const Nibbles nibbles(*o.weight);
      for (int64_t r = 0; r < rows; ++r) {
        prefetch(nibbles.data + (((i + r + kAheadRows) * nibbles.K + j) >> 1), n / 2);
        forEachGroup(nibbles, i + r, j, n, [&](int64_t c, const Eights& even, const Eights& odd) {
          uint16_t* to = bits(out + r * stride + c);
          for (int h = 0; h < 2; ++h) {
            vst1q_u16(to + 8 * h, even.half[h]);
            vst1q_u16(to + 16 + 8 * h, odd.half[h]);
          }
        });
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) readSplit<kGroup, kTail, 2, kChunk>(o, compute, i + r, j, n, out + r * stride);
  }

  /// Rows [i, i + rows), columns [j, j + n), in memory's order, `stride` apart.
  static void rowsNatural(const GemmOperand& o, DType compute, int64_t i, int64_t rows, int64_t j, int64_t n, bf16* out,
                          int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) readNatural(o, compute, i + r, j, n, out + r * stride);
  }

  /// A strip from kStrip rows, `stride` apart.
  static void lanesFromRows(const bf16* rows, int64_t stride, int64_t depth, bf16* strip) {
    for (int64_t k = 0; k < depth; k += 8) {
      for (int lane = 0; lane < kStrip; lane += 2) {
        const uint64x2_t a = fours(rows + lane * stride + k), b = fours(rows + (lane + 1) * stride + k);
        bf16* to = strip + k * kStrip + 4 * lane;
        vst1q_u16(bits(to), vreinterpretq_u16_u64(vtrn1q_u64(a, b)));
        vst1q_u16(bits(to + 4 * kStrip), vreinterpretq_u16_u64(vtrn2q_u64(a, b)));
      }
    }
  }

  /// Strips, kChunk * kStrip apart, of columns [j, j + columns) of rows [i, i + n).
  static void lanes(const GemmOperand& o, DType compute, int64_t i, int64_t n, int64_t j, int64_t columns,
                    bf16* strips) {
    alignas(64) bf16 rows[4][kPanel];
    for (int64_t c0 = 0; c0 < columns; c0 += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, columns - c0), padded = roundUp(count, kStrip);
      for (int64_t r = 0; r < n; r += 4) {
        for (int64_t k = 0; k < 4; ++k) {
          if (r + k < n) {
            lanesOfRow(o, compute, i + r + k, j + c0, count, rows[k]);
          } else {
            std::fill_n(rows[k], padded, bf16{});
          }
        }
        for (int64_t c = 0; c < padded; c += kStrip) {
          const uint16x8x4_t k = {vld1q_u16(bits(rows[0] + c)), vld1q_u16(bits(rows[1] + c)),
                                  vld1q_u16(bits(rows[2] + c)), vld1q_u16(bits(rows[3] + c))};
          vst4q_u16(bits(strips + (c0 + c) * kChunk + r * kStrip), k);
        }
      }
    }
  }

  static void tile(int count, int /*lanes*/, int64_t depth, const bf16* rows, const bf16* strip, float* c, bool first) {
    switch (count) {
#define QLORA_TILE(n) \
  case n:             \
    return tileOf<n>(depth, rows, strip, c, first);
      QLORA_TILE(1)
      QLORA_TILE(2)
      QLORA_TILE(3)
      QLORA_TILE(4)
      QLORA_TILE(5)
      QLORA_TILE(6)
      QLORA_TILE(7)
      QLORA_TILE(8)
      QLORA_TILE(9)
      QLORA_TILE(10)
      QLORA_TILE(11)
      QLORA_TILE(12)
#undef QLORA_TILE
    }
  }

 private:
  static constexpr int kPanel = 128;  // columns of four rows that are put together at a time

  struct Eights {
    uint16x8_t half[2];
  };

  QLORA_INLINE static uint16_t* bits(bf16* p) { return reinterpret_cast<uint16_t*>(p); }
  QLORA_INLINE static uint64x2_t fours(const bf16* p) {
    return vreinterpretq_u64_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  }
  QLORA_INLINE static void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
  }

  static bool hasGroups(const GemmOperand& o) {
    return o.weight && o.weight->data.dtype == DType::u8 && o.weight->K % kGroup == 0 && o.weight->blockSize >= kGroup;
  }

  /// Calls f(c, evens, odds) for each group of columns [j + c, j + c + kGroup) of row i; j and n are whole groups.
  template <class F>
  QLORA_INLINE static void forEachGroup(const Nibbles& w, int64_t i, int64_t j, int64_t n, F&& f) {
    const uint8x16_t four = vdupq_n_u8(15);
    const Sixteen code = loadSixteen(w.code);
    const int64_t begin = i * w.K + j, end = begin + n;
    for (int64_t flat = begin; flat < end;) {
      const int64_t block = flat >> w.shift, stop = std::min(end, (block + 1) << w.shift);
      const float absmax = w.absmax ? w.scale<AbsmaxKind::plain>(block) : w.scale<AbsmaxKind::nested>(block);
      const NibblePlanes<bf16> planes(code, absmax);
      for (; flat < stop; flat += kGroup) {
        const uint8x16_t bytes = vld1q_u8(w.data + (flat >> 1));
        Eights even, odd;
        planes.lookUp(vshrq_n_u8(bytes, 4), even.half);
        planes.lookUp(vandq_u8(bytes, four), odd.half);
        f(flat - begin, even, odd);
      }
    }
  }

  /// Columns [j, j + n) of row i, strip by strip: kVector evens, then kVector odds. Zeros up to the last strip's end.
  static void lanesOfRow(const GemmOperand& o, DType compute, int64_t i, int64_t j, int64_t n, bf16* out) {
    if (hasGroups(o) && n % kGroup == 0) {
      const Nibbles nibbles(*o.weight);
      prefetch(nibbles.data + (((i + kAheadLanes) * nibbles.K + j) >> 1), n / 2);
      return forEachGroup(nibbles, i, j, n, [&](int64_t c, const Eights& even, const Eights& odd) {
        for (int h = 0; h < 2; ++h) {
          const uint64x2_t e = vreinterpretq_u64_u16(even.half[h]), d = vreinterpretq_u64_u16(odd.half[h]);
          vst1q_u16(bits(out + c + 16 * h), vreinterpretq_u16_u64(vtrn1q_u64(e, d)));
          vst1q_u16(bits(out + c + 16 * h + 8), vreinterpretq_u16_u64(vtrn2q_u64(e, d)));
        }
      });
    }
    readSplit<kStrip, kStrip, 2, kPanel>(o, compute, i, j, n, out);
  }

  template <int R>
  static void tileOf(int64_t depth, const bf16* rows, const bf16* strip, float* c, bool first) {
    // Each chunk is summed by itself: over a long K (a vocabulary) one running sum would swallow small products.
    constexpr int kPairs = (R + 1) / 2, kTwos = kStrip / 2;
    float32x4_t sum[kPairs][kTwos] = {};  // row 0 lanes 0 1, row 1 lanes 0 1 of each pair of rows and of lanes
    for (int64_t k = 0; k < depth; k += 4, strip += 4 * kStrip) {
      bfloat16x8_t lane[kTwos];
      for (int l = 0; l < kTwos; ++l) lane[l] = vreinterpretq_bf16_u64(fours(strip + 8 * l));
#pragma GCC unroll 6
      for (int p = 0; p < kPairs; ++p) {
        // A last row without another is multiplied twice.
        const int second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
        uint64x2_t x = vcombine_u64(four(rows + 2 * p * kStride + k), four(rows + second * kStride + k));
        asm volatile("" : "+w"(x));  // as in tile_neon.h
        float32x4_t s[kTwos];
        for (int l = 0; l < kTwos; ++l) s[l] = vbfmmlaq_f32(sum[p][l], vreinterpretq_bf16_u64(x), lane[l]);
        asm volatile("" : "+w"(s[0]), "+w"(s[1]), "+w"(s[2]), "+w"(s[3]));
        for (int l = 0; l < kTwos; ++l) sum[p][l] = s[l];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        const float64x2_t a = vreinterpretq_f64_f32(sum[r / 2][2 * v]),
                          b = vreinterpretq_f64_f32(sum[r / 2][2 * v + 1]);
        const float32x4_t row = vreinterpretq_f32_f64(r % 2 ? vtrn2q_f64(a, b) : vtrn1q_f64(a, b));
        float* total = c + r * kStrip + v * kVector;
        vst1q_f32(total, first ? row : vaddq_f32(vld1q_f32(total), row));
      }
    }
  }

  QLORA_INLINE static uint64x1_t four(const bf16* p) {
    return vreinterpret_u64_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)));
  }
};

}  // namespace qlora::QLORA_ISA
