// The engine on AVX-512 with bf16: pairs of k through vdpbf16ps, which is fma(even, fma(odd, sum)) in each fp32 lane.
#pragma once

#include "simd/gemm_engine.h"
#include "simd/pieces_bf16.h"

namespace qlora::QLORA_ISA {

/// 32 elements of a dense row from p as bf16; only the first n where n < 32, and none where that is negative.
template <class T>
QLORA_INLINE __m512i loadRow(const T* p, int64_t n, float scale) {
  const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << std::max<int64_t>(n, 0)) - 1;
  const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
  if constexpr (std::is_same_v<T, bf16>) {
    const __m512i x = _mm512_maskz_loadu_epi16(mask, p);
    if (scale == 1) return x;
    const __m512 s = _mm512_set1_ps(scale);
    const auto wide = [](__m256i half) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    return bf16Pair(_mm512_mul_ps(wide(_mm512_castsi512_si256(x)), s),
                    _mm512_mul_ps(wide(_mm512_extracti64x4_epi64(x, 1)), s));
  } else {
    const __m512 s = _mm512_set1_ps(scale);
    const auto wide = [&](const T* from, __mmask16 m) {
      if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps(m, from);
      if constexpr (std::is_same_v<T, f16>) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, from));
      if constexpr (std::is_same_v<T, int8_t>) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, from)));
      }
    };
    return bf16Pair(_mm512_mul_ps(wide(p, low), s), _mm512_mul_ps(wide(p + 16, high), s));
  }
}

/// Calls f(pointer to element (0, 0), stride, scale of a row) with the type that a dense operand or weight has.
template <class F>
QLORA_INLINE void withDense(const GemmOperand& o, F&& f) {
  const Weight* w = o.weight;
  const DType dtype = w ? w->data.dtype : o.dtype;
  const void* data = w ? w->data.data<void>() : o.data;
  const int64_t stride = w ? w->K : o.stride;
  const float scale = w ? 1.0f : o.scale;
  switch (dtype) {
    case DType::f32:
      return f(static_cast<const float*>(data), stride, [=](int64_t) { return scale; });
    case DType::bf16:
      return f(static_cast<const bf16*>(data), stride, [=](int64_t) { return scale; });
    case DType::f16:
      return f(static_cast<const f16*>(data), stride, [=](int64_t) { return scale; });
    default:
      return f(static_cast<const int8_t*>(data), stride, [=](int64_t) { return scale; });
  }
}

/// Operands as pairs of bf16, in panels of kDeep steps of K.
template <int kDeep>
struct Bf16Operands {
  using Element = bf16;
  static constexpr int kGroup = 128, kTail = 64, kPiles = 4, kLanesUnit = 64, kStrip = 2 * kVector;
  static constexpr int kChunk = kDeep, kStride = kChunk + 32;
  static constexpr int kMostLanes = 512;  // columns that lanes() takes at most
  // Rows that a decoder asks memory for ahead of their turn.
  static constexpr int kAheadRows = 12, kAheadLanes = 16;

  static bool isNibbles(const GemmOperand& o) { return o.weight && o.weight->data.dtype == DType::u8; }
  static bool isIntegerRows(const GemmOperand& o) { return o.weight && o.weight->data.dtype == DType::i8; }

  /// Rows [i, i + rows), columns [j, j + n), in split order, `stride` apart.
  static void rowsSplit(const GemmOperand& o, DType compute, int64_t i, int64_t rows, int64_t j, int64_t n, bf16* out,
                        int64_t stride) {
    if (isNibbles(o) && hasGroups(*o.weight)) {
      return withGroups(*o.weight, [=](const auto& reader) { rowsOfNibbles(reader, i, rows, j, n, out, stride); });
    }
    if (isNibbles(o) || isIntegerRows(o)) {
      for (int64_t r = 0; r < rows; ++r)
        readSplit<kGroup, kTail, kPiles, kChunk>(o, compute, i + r, j, n, out + r * stride);
      return;
    }
    withDense(o, [&](const auto* data, int64_t from, auto scale) {
      // Of two registers that follow each other, those with the columns 4 i + pile: for the lower half, then the upper.
      __m512i index[kPiles];
      alignas(64) uint16_t columns[32];
      for (int pile = 0; pile < kPiles; ++pile) {
        for (int l = 0; l < 32; ++l)
          columns[l] = static_cast<uint16_t>(splitColumn<kGroup, kPiles>(pile * 32 + l) % 64);
        index[pile] = _mm512_load_si512(columns);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const auto* line = data + (i + r) * from + j;
        const float s = scale(r);
        for (int64_t g = 0; g < n; g += kGroup) {
          __m512i part[4];
          for (int p = 0; p < 4; ++p) part[p] = loadRow(line + g + 32 * p, n - g - 32 * p, s);
          const bool tail = n - g <= kTail;
          for (int pile = 0; pile < kPiles; ++pile) {
            const __m512i lower = _mm512_permutex2var_epi16(part[0], index[pile], part[1]);
            const __m512i upper = _mm512_permutex2var_epi16(part[2], index[pile], part[3]);
            // The upper half of a tail's pile belongs to the next pile, which comes after it.
            _mm512_storeu_si512(out + r * stride + g + (tail ? 16 : 32) * pile,
                                _mm512_mask_blend_epi64(0xf0, lower, upper));
          }
        }
      }
    });
  }

  /// Rows [i, i + rows), columns [j, j + n), in memory's order.
  static void rowsNatural(const GemmOperand& o, DType compute, int64_t i, int64_t rows, int64_t j, int64_t n, bf16* out,
                          int64_t stride) {
    if (isIntegerRows(o)) {
      for (int64_t r = 0; r < rows; ++r) readNatural(o, compute, i + r, j, n, out + r * stride);
      return;
    }
    withDense(o, [&](const auto* data, int64_t from, auto scale) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* line = data + (i + r) * from + j;
        for (int64_t c = 0; c < n; c += 32) {
          _mm_prefetch(line + kAheadRows * from + c, _MM_HINT_T0);
          _mm512_storeu_si512(out + r * stride + c, loadRow(line + c, n - c, scale(r)));
        }
      }
    });
  }

  /// A strip from kStrip rows in split order, `stride` apart.
  static void lanesFromRows(const bf16* rows, int64_t stride, int64_t depth, bf16* strip) {
    const auto* pairs = reinterpret_cast<const float*>(rows);
    auto* out = reinterpret_cast<float*>(strip);
    for (int64_t k = 0; k < depth / 2; k += kVector) {
      for (int half = 0; half < 2; ++half) {
        transpose(pairs + half * kVector * stride / 2 + k, stride / 2, out + k * kStrip + half * kVector, kStrip);
      }
    }
  }

  /// Strips, kChunk * kStrip apart, of columns [j, j + columns) of rows [i, i + n).
  static void lanes(const GemmOperand& o, DType compute, int64_t i, int64_t n, int64_t j, int64_t columns,
                    bf16* strips) {
    if (isNibbles(o) && hasGroups(*o.weight)) {
      return withGroups(*o.weight, [=](const auto& reader) { lanesOfNibbles(reader, i, n, j, columns, strips); });
    }
    if (isNibbles(o) || isIntegerRows(o)) {
      alignas(64) bf16 pair[2][kGroup];
      for (int64_t r = 0; r < n; r += 2) {
        for (int64_t c = 0; c < columns; c += kStrip) {
          const int64_t count = std::min<int64_t>(kStrip, columns - c);
          std::memset(pair, 0, sizeof pair);
          readNatural(o, compute, i + r, j + c, count, pair[0]);
          if (r + 1 < n) readNatural(o, compute, i + r + 1, j + c, count, pair[1]);
          storePair(_mm512_load_si512(pair[0]), _mm512_load_si512(pair[1]), strips + c * kChunk + r * kStrip);
        }
      }
      return;
    }
    withDense(o, [&](const auto* data, int64_t from, auto scale) {
      for (int64_t r = 0; r < n; r += 2) {
        const auto* line = data + (i + r) * from + j;
        for (int64_t c = 0; c < columns; c += kStrip) {
          _mm_prefetch(line + kAheadLanes * from + c, _MM_HINT_T0);
          _mm_prefetch(line + (kAheadLanes + 1) * from + c, _MM_HINT_T0);
          const __m512i first = loadRow(line + c, columns - c, scale(r));
          const __m512i second =
              r + 1 < n ? loadRow(line + from + c, columns - c, scale(r + 1)) : _mm512_setzero_si512();
          storePair(first, second, strips + c * kChunk + r * kStrip);
        }
      }
    });
  }

 private:
  /// Two rows of 32 columns as pairs: the even columns, then the odd ones.
  QLORA_INLINE static void storePair(__m512i first, __m512i second, bf16* out) {
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(kUpper, first, _mm512_slli_epi32(second, 16)));
    _mm512_storeu_si512(out + 32, _mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(first, 16), second));
  }

  template <class Reader>
  static void rowsOfNibbles(const Reader& reader, int64_t i, int64_t rows, int64_t j, int64_t n, bf16* out,
                            int64_t stride) {
    RowPieces<Bf16Operands, Reader> pieces(reader, stride);
    pieces.start(i, rows, j, n, out, 1);
    pieces.finish();
  }

  template <class Reader>
  static void lanesOfNibbles(const Reader& reader, int64_t i, int64_t n, int64_t j, int64_t columns, bf16* strips) {
    LanePieces<Bf16Operands, Reader> pieces(reader);
    pieces.start(i, n, j, columns, strips, 1);
    pieces.finish();
  }
};

struct Bf16Engine : Bf16Operands<512> {
  static constexpr int kRows = 12, kRowUnit = 1, kDepth = 2, kDecoded = 128;
  static_assert(kDecoded <= kMostLanes);
  struct Session {};

  // Tiles of so many rows leave registers for decoding.
  static constexpr int kPieceRows = 8;

  static bool hasPieces(const GemmOperand& o) { return isNibbles(o) && hasGroups(*o.weight); }
  /// Calls f with what decodes a weight of such kind.
  template <class F>
  static void withRowPieces(const GemmOperand& o, F&& f) {
    withGroups(*o.weight,
               [&]<class Reader>(const Reader& reader) { f(RowPieces<Bf16Engine, Reader>(reader, kStride)); });
  }
  template <class F>
  static void withLanePieces(const GemmOperand& o, F&& f) {
    withGroups(*o.weight, [&]<class Reader>(const Reader& reader) { f(LanePieces<Bf16Engine, Reader>(reader)); });
  }

  static void tile(int count, int /*lanes*/, int64_t depth, const bf16* rows, const bf16* strip, float* c, bool first) {
    const Steps<bf16> all{rows, strip, depth};
    NoPieces none;
    switch (count) {
      case 1:
        return tileOf<1>({}, all, c, first, none);
      case 2:
        return tileOf<2>({}, all, c, first, none);
      case 3:
        return tileOf<3>({}, all, c, first, none);
      case 4:
        return tileOf<4>({}, all, c, first, none);
      case 5:
        return tileOf<5>({}, all, c, first, none);
      case 6:
        return tileOf<6>({}, all, c, first, none);
      case 7:
        return tileOf<7>({}, all, c, first, none);
      case 8:
        return tileOf<8>({}, all, c, first, none);
      case 9:
        return tileOf<9>({}, all, c, first, none);
      case 10:
        return tileOf<10>({}, all, c, first, none);
      case 11:
        return tileOf<11>({}, all, c, first, none);
      default:
        return tileOf<12>({}, all, c, first, none);
    }
  }

  /// The same of up to kPieceRows rows; a tick a step. `also` comes first, in the same sums.
  template <class Pieces>
  static void tile(int count, const Steps<bf16>& also, const Steps<bf16>& all, float* c, bool first, Pieces& pieces) {
    switch (count) {
      case 1:
        return tileOf<1>(also, all, c, first, pieces);
      case 2:
        return tileOf<2>(also, all, c, first, pieces);
      case 3:
        return tileOf<3>(also, all, c, first, pieces);
      case 4:
        return tileOf<4>(also, all, c, first, pieces);
      case 5:
        return tileOf<5>(also, all, c, first, pieces);
      case 6:
        return tileOf<6>(also, all, c, first, pieces);
      case 7:
        return tileOf<7>(also, all, c, first, pieces);
      default:
        return tileOf<kPieceRows>(also, all, c, first, pieces);
    }
  }

 private:
  struct NoPieces {
    QLORA_INLINE void tick() {}
  };

  template <int R, class Pieces>
  static void tileOf(const Steps<bf16>& also, const Steps<bf16>& all, float* c, bool first, Pieces& pieces) {
    // Each chunk is summed by itself: over a long K (a vocabulary) one running sum would swallow small products.
    __m512 sum[R][2]{};
    for (const Steps<bf16>* steps : {&also, &all}) {
      const bf16 *rows = steps->rows, *strip = steps->strip;
      const int64_t depth = steps->depth;
      for (int64_t k = 0; k < depth; k += 2) {
        pieces.tick();
        const auto low = reinterpret_cast<__m512bh>(_mm512_loadu_si512(strip + k * kStrip));
        const auto high = reinterpret_cast<__m512bh>(_mm512_loadu_si512(strip + k * kStrip + 32));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, rows + r * kStride + k, sizeof pair);
          const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, low);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, high);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        float* total = c + r * kStrip + v * kVector;
        _mm512_storeu_ps(total, first ? sum[r][v] : _mm512_add_ps(_mm512_loadu_ps(total), sum[r][v]));
      }
    }
  }
};

}  // namespace qlora::QLORA_ISA
