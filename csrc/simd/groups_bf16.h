// Decoding 4-bit weights to bf16 on AVX-512, in groups of 128.
//
// The sixteen values of a block are scaled and rounded once, bf16(code * absmax); the tables of two blocks fill a
// register. The 64 bytes of a group are 32 words of four weights each. A permute reads five bits of a word as its
// index: four of a weight, and a fifth that chooses the table. Two weights of a word get theirs at once, one a byte; a
// shift by 4 before brings the other two there, one by 8 after the upper byte down. So four permutes decode a group,
// and nothing needs to be widened. What comes out is dealt into four piles: pile p has the columns 4 i + p, which is
// the split order (rows.h) here.
#pragma once

#include "simd/nibbles.h"

namespace qlora::QLORA_ISA {

QLORA_INLINE __m512i bf16Pair(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

/// How far ahead of its turn what streams from memory is asked for, into the second cache.
constexpr int64_t kFarBytes = 16384;

/// 128 weights in four piles.
struct Group {
  __m512i pile[4];
};

/// 64 weights in four piles, two a register: what is left of a row.
struct HalfGroup {
  __m512i pile[2];
};

/// 64 columns of two rows, as pairs of a column: of each half the even columns, then the odd ones.
struct RowPairs {
  __m512i even[2], odd[2];
};

/// Decodes rows of a 4-bit weight whose rows are whole groups of 64.
template <AbsmaxKind kAbsmax, bool kHalves>
class GroupReader {
  struct EvenOdd {
    __m512i even, odd;
  };

 public:
  /// Scales that 64 columns have.
  static constexpr int kScales = kHalves ? 2 : 1;

  explicit GroupReader(const Nibbles& n) : n_(n), code_(_mm512_loadu_ps(n.code)) {}

  int64_t columns() const { return n_.K; }

  /// The scales of n elements from `flat` on, both multiples of 64.
  QLORA_INLINE void scales(int64_t flat, int64_t n, float* out) const {
    constexpr int kUnit = kHalves ? 5 : 6;
    const int64_t first = flat >> kUnit, count = n >> kUnit;
    const int shift = n_.shift - kUnit;
    if (shift > 0 || (first & 255) + count > 256) {
      for (int64_t i = 0; i < count; ++i) out[i] = n_.scale<kAbsmax>((first + i) >> shift);
      return;
    }
    // All under one nested scale.
    const float nested = kAbsmax == AbsmaxKind::nested ? n_.nestedAbsmax[first >> 8] : 0.0f;
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kAbsmax == AbsmaxKind::plain) {
        out[i] = n_.absmax[first + i];
      } else {
        float scaled = n_.nestedCode[n_.absmaxCode[first + i]] * nested;
        // Else the compiler makes a gather of the loop, which takes longer than loads one by one.
        asm("" : "+x"(scaled));
        out[i] = scaled + n_.offset;
      }
    }
  }

  /// The group from element `flat` on, a multiple of 64; scale[i] is that of its i-th 64 (32) columns.
  template <class Scale>
  QLORA_INLINE Group read(int64_t flat, const Scale& scale) const {
    return lookUp(_mm512_loadu_si512(n_.data + (flat >> 1)), scale);
  }
  /// The same where a row ends within the group, after 64 columns.
  template <class Scale>
  QLORA_INLINE HalfGroup readHalf(int64_t flat, const Scale& scale) const {
    struct Half {
      const Scale& scale;
      QLORA_INLINE float operator[](int i) const { return i < kScales ? scale[i] : 0.0f; }
    };
    const Group group = lookUp(_mm512_zextsi256_si512(halfGroup(flat)), Half{scale});
    const auto two = [](__m512i a, __m512i b) { return _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1); };
    return {{two(group.pile[0], group.pile[1]), two(group.pile[2], group.pile[3])}};
  }

  struct ScalesAt {
    const GroupReader& reader;
    int64_t flat;

    bool none;  // zeros in place of them

    QLORA_INLINE float operator[](int i) const {
      if (none) return 0;
      return reader.n_.template scale<kAbsmax>((flat + i * (kHalves ? 32 : 64)) >> reader.n_.shift);
    }
  };
  QLORA_INLINE ScalesAt scalesAt(int64_t flat, bool none = false) const { return {*this, flat, none}; }

  /// Scales one by one, for who reads rows in memory's order. Those under double quantization are looked up among the
  /// 256 that the codes of their nested block stand for, which are made once a nested block: two roundings, as ever.
  class Scales {
   public:
    /// Floats that it needs for reads that lie at most `span` elements apart.
    static int64_t bufferSize(const Weight& w, int64_t span) {
      if (kAbsmax == AbsmaxKind::plain) return 0;
      return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(span / w.blockSize / 256 + 2))) * 256;
    }
    /// For elements from `flat` on; the buffer has `size` floats.
    Scales(const GroupReader& reader, float* buffer, int64_t size, int64_t flat)
        : n_(reader.n_), tables_(buffer), inBuffer_((size - 1) & ~int64_t{255}), next_(flat >> n_.shift >> 8) {}

    /// Makes ready for elements before `end`.
    QLORA_INLINE void reach(int64_t end) {
      if constexpr (kAbsmax == AbsmaxKind::nested) {
        for (const int64_t last = (end - 1) >> n_.shift >> 8; next_ <= last; ++next_) {
          float* table = tables_ + (next_ << 8 & inBuffer_);
          for (int i = 0; i < 256; ++i) {
            const float scaled = n_.nestedCode[i] * n_.nestedAbsmax[next_];
            table[i] = scaled + n_.offset;
          }
        }
      }
    }

    struct At {
      const Scales& of;
      int64_t flat;

      QLORA_INLINE float operator[](int i) const {
        const int64_t block = (flat + i * (kHalves ? 32 : 64)) >> of.n_.shift;
        if constexpr (kAbsmax == AbsmaxKind::plain) return of.n_.absmax[block];
        return of.tables_[(block & of.inBuffer_) + of.n_.absmaxCode[block]];
      }
    };
    QLORA_INLINE At at(int64_t flat) const { return {*this, flat}; }

   private:
    const Nibbles n_;
    float* const tables_;
    const int64_t inBuffer_;
    int64_t next_;  // nested block
  };

  /// 64 columns of a row and of the one `below` elements further on, in pairs.
  class Rows {
   public:
    explicit Rows(const GroupReader& reader) : reader_(reader) {
      alignas(64) uint16_t index[32];
      for (int l = 0; l < 32; ++l) index[l] = static_cast<uint16_t>(l / 2 + l % 2 * 32);
      index_[0] = _mm512_load_si512(index);
      index_[1] = _mm512_add_epi16(index_[0], _mm512_set1_epi16(16));
    }

    template <class First, class Second>
    QLORA_INLINE RowPairs read(int64_t flat, int64_t below, const First& first, const Second& second) const {
      const EvenOdd a = reader_.evenOdd(flat, first), b = reader_.evenOdd(flat + below, second);
      RowPairs pairs;
      for (int half = 0; half < 2; ++half) {
        pairs.even[half] = _mm512_permutex2var_epi16(a.even, index_[half], b.even);
        pairs.odd[half] = _mm512_permutex2var_epi16(a.odd, index_[half], b.odd);
      }
      return pairs;
    }

   private:
    const GroupReader& reader_;
    __m512i index_[2];
  };

  QLORA_INLINE void prefetch(int64_t flat) const { _mm_prefetch(n_.data + (flat >> 1), _MM_HINT_T0); }
  /// The line kFarBytes beyond element `flat`.
  QLORA_INLINE void prefetchFar(int64_t flat) const { _mm_prefetch(n_.data + (flat >> 1) + kFarBytes, _MM_HINT_T1); }

 private:
  QLORA_INLINE __m512 scaled(float absmax) const { return _mm512_mul_ps(code_, _mm512_set1_ps(absmax)); }
  QLORA_INLINE __m512i tablesOf(float low, float high) const { return bf16Pair(scaled(low), scaled(high)); }

  QLORA_INLINE __m256i halfGroup(int64_t flat) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(n_.data + (flat >> 1)));
  }

  /// 64 columns, a byte of two a word. The table stands twice in its register, so that bit 4 of an index, which is the
  /// other weight's, needs no mask.
  template <class Scale>
  QLORA_INLINE EvenOdd evenOdd(int64_t flat, const Scale& scale) const {
    const __m512i w = _mm512_cvtepu8_epi16(halfGroup(flat)), even = _mm512_srli_epi16(w, 4);
    const __m512i tables = tablesOf(scale[0], scale[0]);
    if constexpr (kHalves) {
      // Bit 5 chooses the register.
      const __m512i more = tablesOf(scale[1], scale[1]), four = _mm512_set1_epi16(15),
                    half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(32), 1);
      const auto index = [&](__m512i word) {
        return _mm512_ternarylogic_epi32(word, four, half, 0xea);  // (word & four) | half
      };
      return {_mm512_permutex2var_epi16(tables, index(even), more), _mm512_permutex2var_epi16(tables, index(w), more)};
    } else {
      return {_mm512_permutexvar_epi16(even, tables), _mm512_permutexvar_epi16(w, tables)};
    }
  }

  /// scale[i] is that of the i-th 64 (32) columns.
  template <class Scale>
  QLORA_INLINE Group lookUp(__m512i words, const Scale& scale) const {
    const __m512i four = _mm512_set1_epi8(15), tables = tablesOf(scale[0], scale[1]);
    const auto index = [&](__m512i w, __m512i table) {
      return _mm512_ternarylogic_epi32(w, four, table, 0xea);  // (w & four) | table
    };
    const auto lookUpIn = [&](__m512i table, auto&& permute) {
      const __m512i even = index(_mm512_srli_epi16(words, 4), table), odd = index(words, table);
      return Group{
          {permute(even), permute(odd), permute(_mm512_srli_epi16(even, 8)), permute(_mm512_srli_epi16(odd, 8))}};
    };
    if constexpr (kHalves) {
      // A block has 8 words, and bit 5 chooses between two registers of two tables.
      const __m512i more = tablesOf(scale[2], scale[3]);
      return lookUpIn(_mm512_setr_epi64(0, 0, kOne, kOne, 2 * kOne, 2 * kOne, 3 * kOne, 3 * kOne),
                      [&](__m512i i) { return _mm512_permutex2var_epi16(tables, i, more); });
    } else {
      return lookUpIn(_mm512_setr_epi64(0, 0, 0, 0, kOne, kOne, kOne, kOne),
                      [&](__m512i i) { return _mm512_permutexvar_epi16(i, tables); });
    }
  }

  static constexpr int64_t kOne = 0x1010101010101010;  // in bit 4 of each byte
  const Nibbles n_;
  const __m512 code_;
};

QLORA_INLINE bool hasGroups(const Weight& w) { return w.data.dtype == DType::u8 && w.K % 64 == 0; }

/// Calls f with the reader for a weight that has groups, so that the loops in f need not ask what kind it is.
template <class F>
QLORA_INLINE void withGroups(const Weight& w, F&& f) {
  const Nibbles n(w);
  if (n.absmax) {
    n.shift > 5 ? f(GroupReader<AbsmaxKind::plain, false>(n)) : f(GroupReader<AbsmaxKind::plain, true>(n));
  } else {
    n.shift > 5 ? f(GroupReader<AbsmaxKind::nested, false>(n)) : f(GroupReader<AbsmaxKind::nested, true>(n));
  }
}

}  // namespace qlora::QLORA_ISA
