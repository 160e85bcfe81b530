// A block of C while a task makes it: the sums of its tiles, and the ways to C.
//
// A tile holds kRows x kStrip sums. Its lanes are columns in split order (rows.h), kVector evens, then kVector odds,
// where they were decoded, and in memory's order where they are rows that were packed.
#pragma once

#include <cstring>

#include "simd/dropout.h"
#include "simd/gemm_store.h"
#include "simd/vector.h"

namespace qlora::QLORA_ISA {

constexpr int64_t roundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t ceilDivide(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

enum class LaneOrder { natural, split };

template <class E>
struct GemmBlock {
  static constexpr int kStrip = E::kStrip;
  static constexpr int64_t kTile = int64_t{E::kRows} * kStrip;

  int64_t rows, lanes;
  int groupRows;  // at most
  float* tiles;

  int64_t groups() const { return ceilDivide(rows, groupRows); }
  int64_t strips() const { return ceilDivide(lanes, kStrip); }
  /// Rows fall into groups of nearly one size, in whole units.
  int64_t groupStart(int64_t group) const { return std::min(rows, roundUp(group * rows / groups(), E::kRowUnit)); }
  float* tile(int64_t group, int64_t strip) const { return tiles + (group * strips() + strip) * kTile; }

  /// Calls f(first row, rows, strip, its sums) for each tile of the block.
  template <class F>
  void forEachTile(F&& f) const {
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t start = groupStart(group), count = groupStart(group + 1) - start;
      for (int64_t strip = 0; strip < strips(); ++strip) {
        f(start, static_cast<int>(count), strip, tile(group, strip));
      }
    }
  }

  /// The same, all rows of a strip before the next strip.
  template <class F>
  void forEachTileByStrip(F&& f) const {
    for (int64_t strip = 0; strip < strips(); ++strip) {
      for (int64_t group = 0; group < groups(); ++group) {
        const int64_t start = groupStart(group), count = groupStart(group + 1) - start;
        f(start, static_cast<int>(count), strip, tile(group, strip));
      }
    }
  }

  /// Calls f(row, its kStrip sums in strip) for each row of the block.
  template <class F>
  void forEachRow(int64_t strip, F&& f) const {
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t start = groupStart(group), end = groupStart(group + 1);
      float* sums = tile(group, strip);
      for (int64_t row = start; row < end; ++row, sums += kStrip) f(row, sums);
    }
  }

  /// Rows are m, of `columns`, lanes are n in split order.
  void applyDropout(const DropoutMask& dropout, int64_t columns, int64_t m, int64_t n) const {
    for (int64_t strip = 0; strip < strips(); ++strip) {
      forEachRow(strip, [&](int64_t row, float* sums) {
        float factor[kStrip];
        dropoutFactors(dropout, (m + row) * columns + n + strip * kStrip, kStrip, factor);
        for (int l = 0; l < kVector; ++l) {
          sums[l] *= factor[2 * l];
          sums[kVector + l] *= factor[2 * l + 1];
        }
      });
    }
  }

  /// Rows are rows of C from m, lanes, in split order, columns from n.
  void storeDirect(const Gemm& g, int64_t m, int64_t n) const {
    for (int64_t strip = 0; strip < strips(); ++strip) {
      const int64_t first = n + strip * kStrip, count = std::min<int64_t>(kStrip, n + lanes - first);
      forEachRow(strip, [&](int64_t row, const float* sums) {
        float line[kStrip];
        for (int l = 0; l < kVector; ++l) {
          line[2 * l] = sums[l];
          line[2 * l + 1] = sums[kVector + l];
        }
        storeRow(g, m + row, first, count, line);
      });
    }
  }

  /// Lanes are rows of C from m, rows are columns of C from n.
  void storeTransposed(const Gemm& g, int64_t m, int64_t n, LaneOrder order) const {
    constexpr int64_t kPiece = kStoreMost;
    alignas(64) float lines[kStrip][kPiece + kVector];
    alignas(64) float square[kVector * kStrip];
    for (int64_t strip = 0; strip < strips(); ++strip) {
      for (int64_t begin = 0; begin < rows; begin += kPiece) {
        const int64_t end = std::min(rows, begin + kPiece);
        int64_t filled = 0;
        forEachRow(strip, [&](int64_t row, const float* sums) {
          if (row < begin || row >= end) return;
          std::memcpy(square + filled % kVector * kStrip, sums, sizeof(float) * kStrip);
          if (++filled % kVector && row + 1 < end) return;
          const int64_t column = (filled - 1) / kVector * kVector;
          for (int half = 0; half < 2; ++half) {
            transpose(square + half * kVector, kStrip, &lines[half * kVector][column], kPiece + kVector);
          }
        });
        for (int lane = 0; lane < kStrip; ++lane) {
          const int64_t split = lane < kVector ? 2 * lane : 2 * (lane - kVector) + 1;
          const int64_t l = order == LaneOrder::natural ? lane : split;
          const int64_t offset = strip * kStrip + l;
          if (offset < lanes) storeRow(g, m + offset, n + begin, end - begin, lines[lane]);
        }
      }
    }
  }
};

}  // namespace qlora::QLORA_ISA
