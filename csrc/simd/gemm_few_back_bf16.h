// The backward to the input of few tokens (M <= 4) on AVX-512 with bf16: dX[M, K] = dY[M, N] W[N, K] with a 4-bit W.
//
// W is read once, in memory's order, and decoded in registers: lanes are K, and two rows make a pair. Eight rows at a
// time are multiplied into sums that stay in the first cache. A task takes some rows of W and as many columns as that
// cache has sums for; the sums of one column over all rows are added in the order of the tasks.
#pragma once

#include "simd/gemm_bf16.h"
#include "simd/gemm_store.h"

namespace qlora::QLORA_ISA {

class FewTokensBack {
 public:
  static constexpr int64_t kMost = 4;

  static bool takes(const Gemm& g) {
    return g.form == GemmForm::nn && g.M <= kMost && g.K > 0 && g.extra.K == 0 && Bf16Engine::isNibbles(g.b) &&
           hasGroups(*g.b.weight);
  }

  static void run(Context& context, const Gemm& g) {
    switch (g.M) {
      case 1:
        return FewTokensBack(g).multiply<1>(context);
      case 2:
        return FewTokensBack(g).multiply<2>(context);
      case 3:
        return FewTokensBack(g).multiply<3>(context);
      default:
        return FewTokensBack(g).multiply<4>(context);
    }
  }

 private:
  static constexpr int64_t kTasks = 16;    // fewer leave threads idle at the end
  static constexpr int kPairs = 4;         // of rows at a time
  static constexpr int64_t kScaled = 512;  // columns whose scales are decoded at a time
  static constexpr int64_t kPiece = kStoreMost;

  explicit FewTokensBack(const Gemm& g) : g_(g) {}

  /// Pairs of dY, [row / 2][token], with a zero after the last row where that has no partner.
  template <int M>
  uint32_t* packPairs(Context& context) const {
    const int64_t N = g_.K, stride = roundUp(N, 32);
    bf16* rows = context.scratch.take<bf16>(M * stride);
    Bf16Engine::rowsNatural(g_.a, g_.compute, 0, M, 0, N, rows, stride);
    uint32_t* pairs = context.scratch.take<uint32_t>(stride / 2 * M);
    for (int64_t n = 0; n < stride / 2; ++n) {
      for (int m = 0; m < M; ++m) std::memcpy(pairs + n * M + m, rows + m * stride + 2 * n, sizeof *pairs);
    }
    return pairs;
  }

  template <int M>
  void multiply(Context& context) const {
    const int64_t N = g_.K, K = g_.N;
    const uint32_t* dy = packPairs<M>(context);
    const int64_t width = std::min(K, roundUp(4096 / M, 64)), blocks = ceilDivide(K, width);
    const int64_t height = roundUp(ceilDivide(N, ceilDivide(kTasks, blocks)), 2 * kPairs),
                  parts = ceilDivide(N, height);
    float* sums = context.scratch.take<float>(parts * M * K);
    context.pool.parallelFor(parts * blocks, [&](int64_t task, int) {
      const int64_t part = task / blocks, row = part * height, column = task % blocks * width;
      withGroups(*g_.b.weight, [&](const auto& reader) {
        multiplyBlock<M>(reader, dy, row, std::min(N, row + height), column, std::min(K, column + width),
                         sums + part * M * K);
      });
    });
    context.pool.parallelFor(ceilDivide(K, kPiece), [&](int64_t piece, int) {
      const int64_t begin = piece * kPiece, count = std::min(kPiece, K - begin);
      for (int m = 0; m < M; ++m) {
        const float* first = sums + m * K + begin;
        float total[kPiece], line[kPiece];
        std::copy_n(first, count, total);
        for (int64_t part = 1; part < parts; ++part) {
          for (int64_t c = 0; c < count; ++c) total[c] += first[part * M * K + c];
        }
        for (int64_t c = 0; c < count; ++c) line[c] = total[c / 32 * 32 + c % 2 * 16 + c % 32 / 2];
        storeRow(g_, m, begin, count, line);
      }
    });
  }

  /// sums[m, column] over the rows [row, end), columns of each 32 evens first.
  template <int M, class Reader>
  static void multiplyBlock(const Reader& reader, const uint32_t* dy, int64_t row, int64_t end, int64_t column,
                            int64_t columnEnd, float* sums) {
    const int64_t K = reader.columns();
    for (int m = 0; m < M; ++m) std::fill(sums + m * K + column, sums + m * K + columnEnd, 0.0f);
    for (; row + 2 * kPairs <= end; row += 2 * kPairs) {
      multiplyRows<M, kPairs>(reader, dy + row / 2 * M, row, K, column, columnEnd, sums);
    }
    for (; row < end; row += 2) {
      multiplyRows<M, 1>(reader, dy + row / 2 * M, row, row + 1 < end ? K : 0, column, columnEnd, sums);
    }
  }

  /// P pairs of rows; the second one of a pair is `below` elements further on, or nowhere (0).
  template <int M, int P, class Reader>
  static void multiplyRows(const Reader& from, const uint32_t* dy, int64_t row, int64_t below, int64_t column,
                           int64_t columnEnd, float* sums) {
    constexpr int kScales = Reader::kScales;
    const Reader reader = from;
    const typename Reader::Rows rows(reader);
    const int64_t K = reader.columns();
    for (int64_t piece = column; piece < columnEnd; piece += kScaled) {
      const int64_t columns = std::min(kScaled, columnEnd - piece), flat = row * K + piece;
      float scales[2 * P][kScaled / 64 * kScales] = {};
      for (int r = 0; r < 2 * P; ++r) {
        if (r % 2 == 0 || below) reader.scales(flat + r * K, columns, scales[r]);
      }
      for (int64_t c = 0; c < columns; c += 64) {
        __m512 sum[M][4];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) sum[m][v] = _mm512_loadu_ps(sums + m * K + piece + c + v * 16);
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const int64_t first = flat + 2 * p * K + c, scale = c / 64 * kScales;
          if (c % 128 == 0) {
            reader.prefetch(first + 2 * P * K);
            reader.prefetch(first + (2 * P + 1) * K);
          }
          const RowPairs w = rows.read(first, below, scales[2 * p] + scale, scales[2 * p + 1] + scale);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const auto d = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(dy[p * M + m])));
            const auto add = [d](__m512& s, __m512i x) { s = _mm512_dpbf16_ps(s, d, reinterpret_cast<__m512bh>(x)); };
            add(sum[m][0], w.even[0]);
            add(sum[m][1], w.odd[0]);
            add(sum[m][2], w.even[1]);
            add(sum[m][3], w.odd[1]);
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) _mm512_storeu_ps(sums + m * K + piece + c + v * 16, sum[m][v]);
        }
      }
    }
  }

  const Gemm g_;
};

}  // namespace qlora::QLORA_ISA
