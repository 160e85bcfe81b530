// The forward of few tokens (M <= 16) on AVX-512 with bf16, where tiles of 32 tokens would mostly multiply zeros.
//
//   M <= 4    dot products: lanes are K, W is decoded in registers and never stored. Limited by the reading of W.
//   M <= 16   lanes are 4 tokens x 4 pairs of k; W is decoded to rows, of which 128 bits (4 pairs) are broadcast at a
//             time. The 4 partial sums of a token are added when all of K is done.
#pragma once

#include "simd/gemm_bf16.h"
#include "simd/gemm_store.h"

namespace qlora::QLORA_ISA {

class FewTokens {
 public:
  static constexpr int64_t kMost = 16;

  static bool takes(const Gemm& g) { return g.form == GemmForm::nt && g.M <= kMost && !(g.M <= 4 && !direct(g)); }

  static void run(Context& context, const Gemm& g) {
    const FewTokens few(context, g);
    switch (g.M) {
      case 1:
        return few.dots<1>(context);
      case 2:
        return few.dots<2>(context);
      case 3:
        return few.dots<3>(context);
      case 4:
        return few.dots<4>(context);
      default:
        break;
    }
    if (g.M <= 8) return few.quads<2, 12>(context);
    if (g.M <= 12) return few.quads<3, 8>(context);
    few.quads<4, 6>(context);
  }

 private:
  static constexpr int kChunk = Bf16Engine::kChunk, kStride = Bf16Engine::kStride;
  // Bytes of W that dot products ask memory for ahead of their turn.
  static constexpr int64_t kAheadBytes = 4096;

  struct Term {
    GemmOperand b;
    int64_t K;
    bf16* x;
    int64_t xStride;  // between tokens
  };

  /// Whether dot products can read the operand from where it lies.
  static bool direct(const GemmOperand& b) {
    if (Bf16Engine::isNibbles(b)) return hasGroups(*b.weight);
    return !Bf16Engine::isIntegerRows(b);
  }
  static bool direct(const Gemm& g) { return direct(g.b) && (g.extra.K == 0 || direct(g.extra.b)); }

  FewTokens(Context& context, const Gemm& g) : g_(g) {
    if (g.extra.K > 0) addTerm(context, g.extra.a, g.extra.b, g.extra.K);
    if (g.K > 0) addTerm(context, g.a, g.b, g.K);
  }

  void addTerm(Context& context, const GemmOperand& a, const GemmOperand& b, int64_t K) {
    const int64_t stride = roundUp(K, 64);
    bf16* x = context.scratch.take<bf16>(g_.M * stride + 64);
    std::memset(x, 0, static_cast<size_t>(g_.M * stride) * sizeof(bf16));
    // Dot products with a dense W read it in memory's order.
    if (g_.M <= 4 && !Bf16Engine::isNibbles(b)) {
      Bf16Engine::rowsNatural(a, g_.compute, 0, g_.M, 0, K, x, stride);
    } else {
      Bf16Engine::rowsSplit(a, g_.compute, 0, g_.M, 0, K, x, stride);
    }
    terms_[termCount_++] = {b, K, x, stride};
  }

  int64_t rowsPerTask(int64_t most, int64_t unit) const {
    return std::min(most, roundUp(std::max<int64_t>(1, ceilDivide(g_.N, 16)), unit));
  }

  // --- dot products

  template <int M>
  void dots(Context& context) const {
    const int64_t perTask = rowsPerTask(64, 2);
    context.pool.parallelFor(ceilDivide(g_.N, perTask), [&](int64_t task, int) {
      const int64_t begin = task * perTask, end = std::min(g_.N, begin + perTask);
      float lines[M][kStoreMost];
      int64_t n = begin;
      for (; n + 2 <= end; n += 2) dotRows<M, 2>(n, lines, n - begin);
      if (n < end) dotRows<M, 1>(n, lines, n - begin);
      for (int m = 0; m < M; ++m) storeRow(g_, m, begin, end - begin, lines[m]);
    });
  }

  template <int M, int R>
  QLORA_INLINE void dotRows(int64_t n, float (*lines)[kStoreMost], int64_t at) const {
    __m512 sum[R][M][2];
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) sum[r][m][0] = sum[r][m][1] = _mm512_setzero_ps();
    }
    for (int i = 0; i < termCount_; ++i) {
      const Term& term = terms_[i];
      if (Bf16Engine::isNibbles(term.b)) {
        dotNibbles<M, R>(term, n, sum);
      } else {
        dotDense<M, R>(term, n, sum);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) lines[m][at + r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[r][m][0], sum[r][m][1]));
    }
  }

  template <int M, int R>
  QLORA_INLINE static void dotNibbles(const Term& term, int64_t n, __m512 (*sum)[M][2]) {
    withGroups(*term.b.weight, [&](const auto& reader) {
      const auto group = [&](int64_t k) {
        Group w[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) w[r] = reader.read((n + r) * term.K + k);
        multiply<M, R>(term, k, w, sum);
      };
      int64_t k = 0;
      for (; k + 128 <= term.K; k += 128) {  // a line of 64 bytes of each row
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) reader.prefetch((n + r) * term.K + k + 2 * kAheadBytes);
        group(k);
        group(k + 64);
      }
      if (k < term.K) group(k);
    });
  }

  template <int M, int R>
  QLORA_INLINE static void dotDense(const Term& term, int64_t n, __m512 (*sum)[M][2]) {
    withDense(term.b, [&](const auto* data, int64_t stride, auto scale) {
      const float s = scale(n);
      for (int64_t k = 0; k < term.K; k += 64) {
        Group w[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const auto* line = data + (n + r) * stride + k;
          const int64_t left = term.K - k;
          w[r].even = loadRow(line, left, s);
          w[r].odd = left > 32 ? loadRow(line + 32, left - 32, s) : _mm512_setzero_si512();
        }
        multiply<M, R>(term, k, w, sum);
      }
    });
  }

  /// 64 weights of R rows times M tokens; the two halves of a group have sums of their own.
  template <int M, int R>
  QLORA_INLINE static void multiply(const Term& term, int64_t k, const Group* w, __m512 (*sum)[M][2]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const bf16* x = term.x + m * term.xStride + k;
      const auto even = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
      const auto odd = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + 32));
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        sum[r][m][0] = _mm512_dpbf16_ps(sum[r][m][0], even, reinterpret_cast<__m512bh>(w[r].even));
        sum[r][m][1] = _mm512_dpbf16_ps(sum[r][m][1], odd, reinterpret_cast<__m512bh>(w[r].odd));
      }
    }
  }

  // --- lanes of 4 tokens x 4 pairs

  /// 8 k of G groups of 4 tokens, [k / 8][group][token][8].
  template <int G>
  bf16* interleave(Context& context, const Term& term) const {
    bf16* out = context.scratch.take<bf16>(term.xStride * G * 4);
    for (int64_t k = 0; k < term.xStride; k += 8) {
      for (int64_t m = 0; m < 4 * G; ++m) {
        bf16* to = out + k * 4 * G + m * 8;
        if (m < g_.M) {
          std::memcpy(to, term.x + m * term.xStride + k, 16);
        } else {
          std::memset(to, 0, 16);
        }
      }
    }
    return out;
  }

  template <int G, int R>
  void quads(Context& context) const {
    const bf16* x[2] = {};
    for (int i = 0; i < termCount_; ++i) x[i] = interleave<G>(context, terms_[i]);
    const int64_t perTask = rowsPerTask(48, R);
    const int threads = context.pool.size();
    const int64_t panelSize = perTask * kStride, sumsSize = perTask * G * 16;
    bf16* panels = context.scratch.take<bf16>(threads * panelSize);
    float* sumsBuffer = context.scratch.take<float>(threads * sumsSize);
    context.pool.parallelFor(ceilDivide(g_.N, perTask), [&](int64_t task, int thread) {
      const int64_t begin = task * perTask, rows = std::min(perTask, g_.N - begin);
      bf16* panel = panels + thread * panelSize;
      float* sums = sumsBuffer + thread * sumsSize;
      std::memset(sums, 0, static_cast<size_t>(sumsSize) * sizeof(float));
      for (int i = 0; i < termCount_; ++i) {
        const Term& term = terms_[i];
        for (int64_t k = 0; k < term.K; k += kChunk) {
          const int64_t size = std::min<int64_t>(kChunk, term.K - k), depth = roundUp(size, 64);
          Bf16Engine::rowsSplit(term.b, g_.compute, begin, rows, k, size, panel, kStride);
          // Rows beyond the last one are multiplied too, as whatever the panel holds, and not stored.
          for (int64_t r = 0; r < rows; r += R) {
            quadTile<G, R>(depth, panel + r * kStride, x[i] + k * 4 * G, sums + r * G * 16);
          }
        }
      }
      float lines[4 * G][kStoreMost];
      for (int64_t r = 0; r < rows; ++r) {
        for (int g = 0; g < G; ++g) {
          const __m512 s = _mm512_loadu_ps(sums + (r * G + g) * 16);
          const __m512 pairs = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
          alignas(64) float total[16];
          _mm512_store_ps(total, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e)));
          for (int t = 0; t < 4; ++t) lines[4 * g + t][r] = total[4 * t];
        }
      }
      for (int64_t m = 0; m < g_.M; ++m) storeRow(g_, m, begin, rows, lines[m]);
    });
  }

  template <int G, int R>
  static void quadTile(int64_t depth, const bf16* rows, const bf16* x, float* sums) {
    __m512 sum[R][G];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[r][g] = _mm512_loadu_ps(sums + (r * G + g) * 16);
    }
    for (int64_t k = 0; k < depth; k += 8) {
      __m512bh lanes[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) lanes[g] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + k * 4 * G + g * 32));
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + r * kStride + k));
        const auto w = reinterpret_cast<__m512bh>(_mm512_broadcast_i32x4(pairs));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], lanes[g], w);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) _mm512_storeu_ps(sums + (r * G + g) * 16, sum[r][g]);
    }
  }

  const Gemm g_;
  Term terms_[2];
  int termCount_ = 0;
};

}  // namespace qlora::QLORA_ISA
