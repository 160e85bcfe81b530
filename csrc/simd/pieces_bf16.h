// Decoding panels of 4-bit weights piece by piece, in between the steps of a product. Decoding permutes and shifts, a
// product multiplies: units of the processor that work side by side where the instructions come mixed. What is decoded
// is the panel that will be multiplied next.
#pragma once

#include <algorithm>

#include "simd/gemm_engine.h"
#include "simd/groups_bf16.h"

namespace qlora::QLORA_ISA {

/// When the pieces of a panel are decoded: evenly over a number of ticks.
class Pace {
 public:
  void start(int64_t pieces, int64_t ticks) { wait_ = every_ = std::max<int64_t>(1, ticks / pieces); }
  QLORA_INLINE bool tick() {
    if (--wait_ > 0) return false;
    wait_ = every_;
    return true;
  }

 private:
  int64_t wait_ = 1, every_ = 1;
};

/// Decodes 4-bit rows in split order in pieces: 128 columns of a row.
template <class Operands, class Reader>
class RowPieces {
 public:
  RowPieces(const Reader& reader, int64_t stride) : reader_(reader), stride_(stride) {}

  /// As rowsSplit(); there will be `ticks`.
  void start(int64_t i, int64_t rows, int64_t j, int64_t n, bf16* out, int64_t ticks) {
    flat_ = i * reader_.columns() + j;
    rows_ = rows;
    columns_ = n;
    out_ = out;
    pace_.start(rows * ceilDivide(n, Operands::kGroup), ticks);
  }
  QLORA_INLINE void tick() {
    if (pace_.tick() && rows_ > 0) decode();
  }
  void finish() {
    while (rows_ > 0) decode();
  }

 private:
  QLORA_INLINE void decode() {
    const int64_t flat = flat_ + at_;
    const auto scale = reader_.scalesAt(flat);
    reader_.prefetch(flat + Operands::kAheadRows * reader_.columns());
    at_ + Operands::kGroup <= columns_ ? store(reader_.read(flat, scale)) : store(reader_.readHalf(flat, scale));
    at_ += Operands::kGroup;
    if (at_ >= columns_) {
      at_ = 0;
      flat_ += reader_.columns();
      out_ += stride_;
      --rows_;
    }
  }

  template <class G>
  QLORA_INLINE void store(const G& group) {
    constexpr int kRegisters = sizeof(G) / sizeof(__m512i);
#pragma GCC unroll 4
    for (int p = 0; p < kRegisters; ++p) _mm512_storeu_si512(out_ + at_ + 32 * p, group.pile[p]);
  }

  const Reader reader_;
  const int64_t stride_;
  Pace pace_;
  int64_t flat_ = 0, rows_ = 0, columns_ = 0, at_ = 0;
  bf16* out_ = nullptr;
};

/// Decodes 4-bit rows into lanes in pieces: 64 columns of a pair of rows.
template <class Operands, class Reader>
class LanePieces {
 public:
  explicit LanePieces(const Reader& reader) : reader_(reader), pairs_(reader_) {}
  LanePieces(const LanePieces&) = delete;
  LanePieces& operator=(const LanePieces&) = delete;

  /// As lanes(); there will be `ticks`.
  void start(int64_t i, int64_t n, int64_t j, int64_t columns, bf16* strips, int64_t ticks) {
    flat_ = i * reader_.columns() + j;
    rows_ = n;
    columns_ = columns;
    strips_ = strips;
    pace_.start(ceilDivide(n, 2) * ceilDivide(columns, 64), ticks);
  }
  QLORA_INLINE void tick() {
    if (pace_.tick() && rows_ > 0) decode();
  }
  void finish() {
    while (rows_ > 0) decode();
  }

 private:
  QLORA_INLINE void decode() {
    const int64_t K = reader_.columns(), flat = flat_ + at_, below = rows_ > 1 ? K : 0;
    if (at_ % 128 == 0) {
      reader_.prefetch(flat + Operands::kAheadLanes * K);
      reader_.prefetch(flat + (Operands::kAheadLanes + 1) * K);
    }
    // The last row's other half counts as zeros.
    const RowPairs pairs = pairs_.read(flat, below, reader_.scalesAt(flat), reader_.scalesAt(flat + below, below == 0));
    bf16* to = strips_ + at_ * Operands::kChunk;
    for (int half = 0; half < 2; ++half, to += Operands::kChunk * Operands::kStrip) {
      _mm512_storeu_si512(to, pairs.even[half]);
      _mm512_storeu_si512(to + 32, pairs.odd[half]);
    }
    at_ += 64;
    if (at_ >= columns_) {
      at_ = 0;
      flat_ += 2 * K;
      strips_ += 2 * Operands::kStrip;
      rows_ -= 2;
    }
  }

  const Reader reader_;
  const typename Reader::Rows pairs_;
  Pace pace_;
  int64_t flat_ = 0, rows_ = 0, columns_ = 0, at_ = 0;
  bf16* strips_ = nullptr;
};

}  // namespace qlora::QLORA_ISA
