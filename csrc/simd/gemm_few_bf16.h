// The forward of few tokens (M <= 16) on AVX-512 with bf16, where tiles of 32 tokens would mostly multiply zeros.
//
//   M <= 4    dot products: lanes are K, W is decoded in registers and never stored. Limited by the reading of W, which
//             is asked for far ahead in memory's order.
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
    // Sums leave room in the registers for decoding.
    if (g.M <= 8) return few.quads<2, 10>(context);
    if (g.M <= 12) return few.quads<3, 7>(context);
    few.quads<4, 5>(context);
  }

 private:
  static constexpr int kChunk = Bf16Engine::kChunk, kStride = Bf16Engine::kStride;
  // Dot products: rows of W a task takes at most, rows at a time.
  static constexpr int64_t kDotsMost = 64;
  template <int M>
  static constexpr int kDotRows = M <= 2 ? 4 : 2;

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
    const int64_t stride = roundUp(K, Bf16Engine::kGroup);
    bf16* x = context.scratch.take<bf16>(g_.M * stride);
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
    const int64_t perTask = rowsPerTask(kDotsMost, kDotRows<M>);
    int64_t scalesSize = 0;
    for (int i = 0; i < termCount_; ++i) {
      if (!Bf16Engine::isNibbles(terms_[i].b)) continue;
      withGroups(*terms_[i].b.weight, [&]<class Reader>(const Reader&) {
        scalesSize = std::max(scalesSize, Reader::Scales::bufferSize(*terms_[i].b.weight, kDotRows<M> * terms_[i].K));
      });
    }
    float* scales = context.scratch.take<float>(context.pool.size() * scalesSize);
    context.pool.parallelFor(ceilDivide(g_.N, perTask), [&](int64_t task, int thread) {
      const int64_t begin = task * perTask, rows = std::min(perTask, g_.N - begin);
      // 16 partial sums of each row and token.
      alignas(64) float sums[kDotsMost][M][kVector];
      std::memset(sums, 0, static_cast<size_t>(rows) * sizeof(sums[0]));
      for (int i = 0; i < termCount_; ++i) {
        const Term& term = terms_[i];
        if (Bf16Engine::isNibbles(term.b)) {
          withGroups(*term.b.weight, [&]<class Reader>(const Reader& reader) {
            typename Reader::Scales scale(reader, scales + thread * scalesSize, scalesSize, begin * term.K);
            forRows<kDotRows<M>>(rows, [&](auto count, int64_t r) {
              const int64_t flat = (begin + r) * term.K;
              scale.reach(flat + count * term.K);
              dotNibbles<M, count>(reader, scale, term, flat, sums + r);
            });
          });
        } else {
          withDense(term.b, [&](const auto* data, int64_t stride, auto scale) {
            forRows<kDotRows<M>>(rows, [&](auto count, int64_t r) {
              dotDense<M, count>(data + (begin + r) * stride, stride, scale(begin + r), term, sums + r);
            });
          });
        }
      }
      float line[kDotsMost];
      for (int m = 0; m < M; ++m) {
        for (int64_t r = 0; r < rows; ++r) {
          line[r] = _mm512_reduce_add_ps(_mm512_load_ps(sums[r][m]));
        }
        storeRow(g_, m, begin, rows, line);
      }
    });
  }

  /// Calls f(how many rows, the first of them) for pieces of `rows` rows.
  template <int R, class F>
  QLORA_INLINE static void forRows(int64_t rows, F&& f) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) f(std::integral_constant<int, R>{}, r);
    for (; r < rows; ++r) f(std::integral_constant<int, 1>{}, r);
  }

  /// R rows from element `flat` on.
  template <int M, int R, class Reader>
  static void dotNibbles(const Reader& shared, const typename Reader::Scales& scales, const Term& term, int64_t flat,
                         float (*sums)[M][kVector]) {
    const Reader reader = shared;
    const typename Reader::Scales scale = scales;
    const int64_t K = term.K;
    const bf16* x = term.x;
    int64_t ahead = flat;
    Dots<M, R> sum;
    int64_t k = 0;
    for (; k + 128 <= K; k += 128) {
      Group w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r, ahead += 128) {
        reader.prefetchFar(ahead);
        const int64_t from = flat + r * K + k;
        w[r] = reader.read(from, scale.at(from));
      }
      sum.add(w, x + k, term.xStride);
    }
    if (k < K) {
      HalfGroup w[R];
      for (int r = 0; r < R; ++r) {
        const int64_t from = flat + r * K + k;
        w[r] = reader.readHalf(from, scale.at(from));
      }
      sum.add(w, x + k, term.xStride);
    }
    sum.addTo(sums);
  }

  /// `data` is the first of R rows, `stride` apart.
  template <int M, int R, class T>
  static void dotDense(const T* data, int64_t stride, float scale, const Term& term, float (*sums)[M][kVector]) {
    const char* ahead = reinterpret_cast<const char*>(data) + kFarBytes;
    Dots<M, R> sum;
    int64_t k = 0;
    for (; k + 128 <= term.K; k += 128) {
      Group w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) w[r].pile[p] = loadRow(data + r * stride + k + 32 * p, 32, scale);
#pragma GCC unroll 8
        for (size_t line = 0; line < 2 * sizeof(T); ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      }
      sum.add(w, term.x + k, term.xStride);
    }
    for (; k < term.K; k += 32) {
      Pile w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r].pile[0] = loadRow(data + r * stride + k, term.K - k, scale);
      sum.add(w, term.x + k, term.xStride);
    }
    sum.addTo(sums);
  }

  /// 32 weights.
  struct Pile {
    __m512i pile[1];
  };

  /// Dot products of R rows and M tokens, in registers.
  template <int M, int R>
  struct Dots {
    __m512 sum[R][M]{};

    /// Of each row the same columns; the tokens' elements for them are xStride apart.
    template <class W>
    QLORA_INLINE void add(const W (&w)[R], const bf16* x, int64_t xStride) {
      constexpr int kPiles = sizeof(W) / sizeof(__m512i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int p = 0; p < kPiles; ++p) {
          const auto tokens = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + m * xStride + 32 * p));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            sum[r][m] = _mm512_dpbf16_ps(sum[r][m], tokens, reinterpret_cast<__m512bh>(w[r].pile[p]));
          }
        }
      }
    }

    QLORA_INLINE void addTo(float (*sums)[M][kVector]) const {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          _mm512_store_ps(sums[r][m], _mm512_add_ps(_mm512_load_ps(sums[r][m]), sum[r][m]));
        }
      }
    }
  };

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

  /// Panels of any other weight, read at once.
  class WholePanel {
   public:
    WholePanel(const GemmOperand& b, DType compute) : b_(b), compute_(compute) {}

    void start(int64_t row, int64_t rows, int64_t k, int64_t size, bf16* panel, int64_t) {
      Bf16Engine::rowsSplit(b_, compute_, row, rows, k, size, panel, kStride);
    }
    QLORA_INLINE void tick() {}
    void finish() {}

   private:
    const GemmOperand b_;
    const DType compute_;
  };

  /// sums += the product of rows [begin, begin + rows). While a panel is multiplied, the next one is decoded.
  template <int G, int R, class Pieces>
  void quadTerm(const Term& term, const bf16* x, int64_t begin, int64_t rows, Pieces& pieces, bf16* panels,
                float* sums) const {
    const int64_t groups = ceilDivide(rows, R), count = ceilDivide(term.K, kChunk) * groups;
    const auto start = [&](int64_t step, int64_t ticks) {
      const int64_t k = step / groups * kChunk, r = step % groups * R;
      pieces.start(begin + r, std::min<int64_t>(R, rows - r), k, std::min<int64_t>(kChunk, term.K - k),
                   panels + step % 2 * R * kStride, ticks);
    };
    start(0, 1);
    pieces.finish();
    for (int64_t step = 0; step < count; ++step) {
      const int64_t k = step / groups * kChunk, r = step % groups * R;
      const int64_t depth = splitDepth<Bf16Engine>(std::min<int64_t>(kChunk, term.K - k));
      if (step + 1 < count) start(step + 1, depth / 8);
      // Of rows beyond the last one, whatever the panel holds is multiplied, and not stored.
      quadTile<G, R>(depth, panels + step % 2 * R * kStride, x + k * 4 * G, sums + r * G * 16, pieces);
      pieces.finish();
    }
  }

  template <int G, int R>
  void quads(Context& context) const {
    const bf16* x[2] = {};
    for (int i = 0; i < termCount_; ++i) x[i] = interleave<G>(context, terms_[i]);
    const int64_t perTask = rowsPerTask(48 / R * R, R);
    const int threads = context.pool.size();
    const int64_t panelSize = 2 * R * kStride, sumsSize = perTask * G * 16;
    bf16* panels = context.scratch.take<bf16>(threads * panelSize);
    float* sumsBuffer = context.scratch.take<float>(threads * sumsSize);
    context.pool.parallelFor(ceilDivide(g_.N, perTask), [&](int64_t task, int thread) {
      const int64_t begin = task * perTask, rows = std::min(perTask, g_.N - begin);
      float* sums = sumsBuffer + thread * sumsSize;
      std::memset(sums, 0, static_cast<size_t>(sumsSize) * sizeof(float));
      for (int i = 0; i < termCount_; ++i) {
        const Term& term = terms_[i];
        const auto multiply = [&](auto&& pieces) {
          quadTerm<G, R>(term, x[i], begin, rows, pieces, panels + thread * panelSize, sums);
        };
        if (Bf16Engine::hasPieces(term.b)) {
          Bf16Engine::withRowPieces(term.b, multiply);
        } else {
          multiply(WholePanel(term.b, g_.compute));
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

  template <int G, int R, class Pieces>
  static void quadTile(int64_t depth, const bf16* rows, const bf16* x, float* sums, Pieces& pieces) {
    __m512 sum[R][G];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[r][g] = _mm512_loadu_ps(sums + (r * G + g) * 16);
    }
    for (int64_t k = 0; k < depth; k += 8) {
      pieces.tick();
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
