// The forward of few tokens (M <= 4) in fp32: dot products along K, of rows that are decoded into the first cache.
#pragma once

#include "simd/gemm_fp32.h"

namespace qlora::QLORA_ISA {

class FewTokensFp32 {
 public:
  static constexpr int64_t kMost = 4;

  static bool takes(const Gemm& g) { return g.form == GemmForm::nt && g.M <= kMost; }

  static void run(Context& context, const Gemm& g) {
    const FewTokensFp32 few(context, g);
    switch (g.M) {
      case 1:
        return few.dots<1>(context);
      case 2:
        return few.dots<2>(context);
      case 3:
        return few.dots<3>(context);
      default:
        return few.dots<4>(context);
    }
  }

 private:
  static constexpr int kRows = 4;  // at a time
  static constexpr int64_t kRowsPerTask = 64;
  static constexpr int kChunk = Fp32Engine::kChunk, kStride = Fp32Engine::kStride, kGroup = Fp32Engine::kGroup;

  struct Term {
    GemmOperand b;
    int64_t K;
    float* x;
    int64_t xStride;  // between tokens
    bool split;
  };

  FewTokensFp32(Context& context, const Gemm& g) : g_(g) {
    if (g.extra.K > 0) addTerm(context, g.extra.a, g.extra.b, g.extra.K);
    if (g.K > 0) addTerm(context, g.a, g.b, g.K);
  }

  void addTerm(Context& context, const GemmOperand& a, const GemmOperand& b, int64_t K) {
    const int64_t stride = roundUp(K, kGroup);
    float* x = context.scratch.take<float>(g_.M * stride + kGroup);
    std::fill_n(x, g_.M * stride, 0.0f);
    const bool split = hasSplitOrder(b);
    for (int64_t k = 0; k < K; k += kChunk) {
      const int64_t n = std::min<int64_t>(kChunk, K - k);
      if (split) {
        Fp32Engine::rowsSplit(a, g_.compute, 0, g_.M, k, n, x + k, stride);
      } else {
        Fp32Engine::rowsNatural(a, g_.compute, 0, g_.M, k, n, x + k, stride);
      }
    }
    terms_[termCount_++] = {b, K, x, stride, split};
  }

  template <int M>
  void dots(Context& context) const {
    const int64_t perTask = std::min(kRowsPerTask, roundUp(ceilDivide(g_.N, 16), kRows));
    context.pool.parallelFor(ceilDivide(g_.N, perTask), [&](int64_t task, int) {
      const int64_t begin = task * perTask, end = std::min(g_.N, begin + perTask);
      float lines[M][kStoreMost];
      for (int64_t n = begin; n < end; n += kRows) dotRows<M>(n, std::min<int64_t>(kRows, end - n), lines, n - begin);
      for (int m = 0; m < M; ++m) storeRow(g_, m, begin, end - begin, lines[m]);
    });
  }

  template <int M>
  void dotRows(int64_t n, int64_t rows, float (*lines)[kStoreMost], int64_t at) const {
    Vector sum[kRows][M] = {};
    alignas(64) float panel[kRows * kStride];
    std::memset(panel, 0, sizeof panel);
    for (int i = 0; i < termCount_; ++i) {
      const Term& term = terms_[i];
      for (int64_t k = 0; k < term.K; k += kChunk) {
        const int64_t size = std::min<int64_t>(kChunk, term.K - k), padded = roundUp(size, kGroup);
        if (term.split) {
          Fp32Engine::rowsSplit(term.b, g_.compute, n, rows, k, size, panel, kStride);
        } else {
          Fp32Engine::rowsNatural(term.b, g_.compute, n, rows, k, size, panel, kStride);
          for (int64_t r = 0; r < rows; ++r) std::fill(panel + r * kStride + size, panel + r * kStride + padded, 0.0f);
        }
        for (int64_t c = 0; c < padded; c += kVector) {
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const Vector x = load(term.x + m * term.xStride + k + c);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sum[r][m] = multiplyAdd(load(panel + r * kStride + c), x, sum[r][m]);
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int m = 0; m < M; ++m) {
        float total = 0;
        for (int l = 0; l < kVector; ++l) total += sum[r][m][l];
        lines[m][at + r] = total;
      }
    }
  }

  const Gemm g_;
  Term terms_[2];
  int termCount_ = 0;
};

}  // namespace qlora::QLORA_ISA
