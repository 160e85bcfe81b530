// Products with one thin side on AVX-512 with bf16: LoRA's own, whose thin side is the rank.
//
//   nn, N <= 16    u = dy B. A tile of 32 lanes would be half empty: here 24 rows by one register of 16 lanes, as many
//                  sums.
//   tn             dA = u^T x, dB = dy^T t. The wide operand is read once, and each element serves so few products that
//                  reading and interleaving it would take as long as they do. So it is taken in pieces of rows as they
//                  lie in memory, the next of which is asked for while one is multiplied, and the first rows that are
//                  multiplied make the strip of lanes for the others. The wide rows can be copied to
//                  panels as they pass, for products nn that multiply them next.
#pragma once

#include "simd/gemm_bf16.h"

namespace qlora::QLORA_ISA {

class ThinProducts {
 public:
  static bool takes(const Gemm& g) {
    if (g.extra.K > 0 || g.K == 0 || g.b.weight) return false;
    if (g.form == GemmForm::nn) return g.N <= kVector;
    const GemmOperand& wide = g.M > g.N ? g.a : g.b;
    return g.form == GemmForm::tn && std::min(g.M, g.N) <= kThin && wide.dtype == DType::bf16 && wide.scale == 1;
  }

  static void run(Context& context, const Gemm& g) {
    if (g.form == GemmForm::nn) return narrow(context, g);
    if (g.M <= g.N) return flat(context, g, Result::rows);
    flat(context, swapped(g), Result::columns);
  }

  /// Whether runThatPacks() takes it: where A is the wide one.
  static bool packs(const Gemm& g) { return g.form == GemmForm::tn && g.M > g.N && g.N > 0 && takes(g); }

  /// As run(), and the rows of A are copied to their panels for nn as they pass.
  static PackedA runThatPacks(Context& context, const Gemm& g) {
    bf16* panels = Engine<Bf16Engine>::rowPanels(context, g.K, g.M);
    flat(context, swapped(g), Result::columns, panels);
    return {GemmForm::nn, g.compute, g.K, g.M, panels};
  }

 private:
  static constexpr int kChunk = Bf16Engine::kChunk, kStride = Bf16Engine::kStride, kStrip = Bf16Engine::kStrip;

  static Gemm swapped(Gemm g) {
    std::swap(g.M, g.N);
    std::swap(g.a, g.b);
    return g;
  }

  /// Calls f with the largest of `counts` that is at most `rows`, as a constant, for rows after rows until all are
  /// done.
  template <int... counts, class F>
  QLORA_INLINE static void forCounts(int64_t rows, F&& f) {
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      static_cast<void>(
          ((left >= counts && (f(std::integral_constant<int, counts>{}, row), row += counts, true)) || ...));
    }
  }

  QLORA_INLINE static __m512bh broadcastPair(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }

  // --- nn: one register of lanes

  static constexpr int kTall = 24;

  static void narrow(Context& context, const Gemm& g) {
    const PackedA a = g.packed ? *g.packed : Engine<Bf16Engine>::pack(context, g.form, g.compute, g.a, g.M, g.K, false);
    const auto* rows = static_cast<const bf16*>(a.panels);
    // [k / 2][lane][2]
    bf16* lanes = context.scratch.take<bf16>(roundUp(g.K, 2) * kVector);
    constexpr int64_t kRowsPerTask = 64;
    context.pool.parallelFor(ceilDivide(g.K, kRowsPerTask), [&](int64_t task, int) {
      const int64_t begin = task * kRowsPerTask, count = std::min(kRowsPerTask, g.K - begin);
      alignas(64) bf16 line[kRowsPerTask * 32];
      Bf16Engine::rowsNatural(g.b, g.compute, begin, count, 0, g.N, line, 32);
      if (count % 2) std::fill_n(line + count * 32, 32, bf16{});
      for (int64_t k = 0; k < count; k += 2) {
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_load_si512(line + k * 32))),
                      second = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_load_si512(line + k * 32 + 32)));
        _mm512_storeu_si512(lanes + (begin + k) * kVector, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
      }
    });
    context.pool.parallelFor(ceilDivide(g.M, kTall), [&](int64_t task, int) {
      const int64_t m = task * kTall;
      forCounts<kTall, 8, 3, 1>(std::min<int64_t>(kTall, g.M - m), [&](auto count, int64_t row) {
        alignas(64) float sums[count][kVector];
        const bf16* panel = rows + (m + row) * kStride;
        for (int64_t k = 0; k < g.K; k += kChunk, panel += g.M * kStride) {
          // What comes next: the same rows of the next chunk, or the rows below of the first one.
          const bf16* next = k + kChunk < g.K ? panel + g.M * kStride : rows + (m + row + count) * kStride;
          tall<count>(std::min<int64_t>(kChunk, roundUp(g.K - k, 2)), panel, lanes + k * kVector, sums, k == 0, next);
        }
        for (int r = 0; r < count; ++r) storeRow(g, m + row + r, 0, g.N, sums[r]);
      });
    });
  }

  template <int R>
  static void tall(int64_t depth, const bf16* rows, const bf16* lanes, float (*c)[kVector], bool first,
                   const bf16* next) {
    __m512 sum[R]{};
    for (int64_t k = 0; k < depth; k += 2) {
      // As many lines as R rows have, over the steps of a chunk; beyond the end of a buffer that does no harm.
      _mm_prefetch(next, _MM_HINT_T1);
      _mm_prefetch(next + 32, _MM_HINT_T1);
      next += 64;
      const auto lane = reinterpret_cast<__m512bh>(_mm512_loadu_si512(lanes + k * kVector));
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbf16_ps(sum[r], broadcastPair(rows + r * kStride + k), lane);
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) _mm512_store_ps(c[r], first ? sum[r] : _mm512_add_ps(_mm512_load_ps(c[r]), sum[r]));
  }

  // --- tn: the wide operand as it lies

  using Block = GemmBlock<Bf16Engine>;
  static constexpr int64_t kThin = 128, kPiece = 128, kWide = 512, kWideLeast = 128;
  enum class Result { rows, columns };  // what the thin side's M are in C

  /// Asks memory for rows of `columns`, line by line as they lie.
  struct Ahead {
    const bf16* row;
    int64_t stride, columns, at = 0;

    QLORA_INLINE void line() {
      _mm_prefetch(row + at, _MM_HINT_T1);
      at += kStrip;
      if (at < columns) return;
      at = 0;
      row += stride;
    }
    QLORA_INLINE void tick() { line(); }
  };

  /// Rows of up to kStrip columns.
  struct Lying {
    const bf16* row;
    bf16* copy;  // where they are copied, kStride apart, if anywhere
    int64_t stride, rows;
    __mmask32 columns;
    int64_t linesPerStep;  // to ask for ahead; the second tile of a strip asks for the other one, where there is one
  };

  /// `copies`: panels for nn of the wide operand, or none.
  static void flat(Context& context, const Gemm& g, Result result, bf16* copies = nullptr) {
    const PackedA a = g.packed ? *g.packed : Engine<Bf16Engine>::pack(context, g.form, g.compute, g.a, g.M, g.K, false);
    const int threads = context.pool.size();
    const int64_t tasks = std::max(ceilDivide(g.N, kWide), std::min<int64_t>(4 * threads, ceilDivide(g.N, kWideLeast)));
    const int64_t columns = roundUp(ceilDivide(g.N, tasks), kStrip);
    const int64_t size = ceilDivide(g.M, Bf16Engine::kPieceRows) * columns / kStrip * Block::kTile;
    float* sums = context.scratch.take<float>(threads * size);
    context.pool.parallelFor(ceilDivide(g.N, columns), [&](int64_t task, int thread) {
      const int64_t n = task * columns;
      const Block block{g.M, std::min(columns, g.N - n), Bf16Engine::kPieceRows, sums + thread * size};
      for (int64_t k = 0; k < g.K; k += kPiece) {
        multiplyPiece(g, static_cast<const bf16*>(a.panels), block, k, n, copies);
      }
      result == Result::rows ? block.storeDirect(g, 0, n) : block.storeTransposed(g, n, 0, LaneOrder::split);
    });
  }

  static void multiplyPiece(const Gemm& g, const bf16* panels, const Block& block, int64_t k, int64_t n, bf16* copies) {
    alignas(64) bf16 strip[kPiece * kStrip];
    const auto* wide = static_cast<const bf16*>(g.b.data) + n;
    const int64_t count = std::min(kPiece, g.K - k), depth = roundUp(count, 2);
    const bf16* rows = panels + k / kChunk * g.M * kStride + k % kChunk;
    // After the last piece, the first of the next columns, which the same thread takes next.
    const bool last = k + kPiece >= g.K;
    Ahead ahead{last ? wide + block.lanes : wide + (k + kPiece) * g.b.stride, g.b.stride, block.lanes};
    block.forEachTileByStrip([&](int64_t row, int tileRows, int64_t s, float* tile) {
      if (row > 0 && row == block.groupStart(1)) {
        return Bf16Engine::tile(tileRows, {}, {rows + row * kStride, strip, depth}, tile, k == 0, ahead);
      }
      if (row > 0) return Bf16Engine::tile(tileRows, kStrip, depth, rows + row * kStride, strip, tile, k == 0);
      const int64_t left = block.lanes - s * kStrip, column = n + s * kStrip;
      bf16* copy = copies ? copies + (column / kChunk * g.K + k) * kStride + column % kChunk : nullptr;
      const Lying lying{
          wide + k * g.b.stride + s * kStrip, copy, g.b.stride, count, left >= kStrip ? 0xffffffffu : (1u << left) - 1,
          block.groups() > 1 ? 1 : 2};
      switch (tileRows) {
        case 1:
          return first<1>(lying, rows, strip, tile, k == 0, ahead);
        case 2:
          return first<2>(lying, rows, strip, tile, k == 0, ahead);
        case 3:
          return first<3>(lying, rows, strip, tile, k == 0, ahead);
        case 4:
          return first<4>(lying, rows, strip, tile, k == 0, ahead);
        case 5:
          return first<5>(lying, rows, strip, tile, k == 0, ahead);
        case 6:
          return first<6>(lying, rows, strip, tile, k == 0, ahead);
        case 7:
          return first<7>(lying, rows, strip, tile, k == 0, ahead);
        default:
          return first<Bf16Engine::kPieceRows>(lying, rows, strip, tile, k == 0, ahead);
      }
    });
  }

  /// The tile of the first rows, which makes the strip.
  template <int R>
  static void first(const Lying& lying, const bf16* rows, bf16* strip, float* c, bool first, Ahead& ahead) {
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    __m512 sum[R][2]{};
    Ahead next = ahead;
    const bf16* row = lying.row;
    bf16* copy = lying.copy;
    for (int64_t k = 0; k < lying.rows; k += 2, row += 2 * lying.stride) {
      next.line();
      if (lying.linesPerStep > 1) next.line();
      const __m512i a = _mm512_maskz_loadu_epi16(lying.columns, row);
      const __m512i b = _mm512_maskz_loadu_epi16(k + 1 < lying.rows ? lying.columns : 0, row + lying.stride);
      if (copy) {
        _mm512_storeu_si512(copy, a);
        if (k + 1 < lying.rows) _mm512_storeu_si512(copy + kStride, b);
        copy += 2 * kStride;
      }
      const __m512i even = _mm512_mask_blend_epi16(kUpper, a, _mm512_slli_epi32(b, 16));
      const __m512i odd = _mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(a, 16), b);
      _mm512_store_si512(strip + k * kStrip, even);
      _mm512_store_si512(strip + k * kStrip + 32, odd);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh x = broadcastPair(rows + r * kStride + k);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, reinterpret_cast<__m512bh>(even));
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, reinterpret_cast<__m512bh>(odd));
      }
    }
    ahead = next;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        float* total = c + r * kStrip + v * kVector;
        _mm512_storeu_ps(total, first ? sum[r][v] : _mm512_add_ps(_mm512_loadu_ps(total), sum[r][v]));
      }
    }
  }
};

}  // namespace qlora::QLORA_ISA
