// Products of any form, type and shape: tiles of fp32 in shared memory, and multiply-adds. What the other kernels do
// not take, and what they are compared with.
#include "cuda/gemm.h"

namespace qlora::cuda {

namespace {

constexpr int kTile = 64;  // of C, square
constexpr int kDepth = 16;
constexpr int kSide = 16;              // threads along a side of the tile
constexpr int kOwn = kTile / kSide;    // rows and columns of a thread: `kSide` apart, so that no bank is asked twice
constexpr int kRow = kTile + 1;

/// tile[k][i] = element (i, k) of an operand whose element (row, column) is (i, k), or if `transposed` (k, i); zeros
/// beyond its end.
template <bool transposed, class T>
QLORA_DEVICE void loadTile(const Elements& e, int64_t firstI, int64_t I, int64_t firstK, int64_t K, float* tile) {
  for (int at = static_cast<int>(threadIdx.x); at < kTile * kDepth; at += kSide * kSide) {
    // Neighbouring threads read neighbours of a row.
    const int i = transposed ? at % kTile : at / kDepth, k = transposed ? at / kTile : at % kDepth;
    const int64_t ii = firstI + i, kk = firstK + k;
    float value = 0;
    if (ii < I && kk < K) value = toFloat(fromFloat<T>(transposed ? e.at(kk, ii) : e.at(ii, kk)));
    tile[k * kRow + i] = value;
  }
}

template <GemmForm form, class T>
QLORA_DEVICE void addProduct(const Elements& a, const Elements& b, int64_t firstM, int64_t M, int64_t firstN, int64_t N,
                             int64_t K, float* tileA, float* tileB, float (&sum)[kOwn][kOwn]) {
  const int y = static_cast<int>(threadIdx.x) / kSide, x = static_cast<int>(threadIdx.x) % kSide;
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    loadTile<form == GemmForm::tn, T>(a, firstM, M, k0, K, tileA);
    loadTile<form != GemmForm::nt, T>(b, firstN, N, k0, K, tileB);
    syncBlock();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float own[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) own[j] = tileB[k * kRow + x + j * kSide];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float left = tileA[k * kRow + y + i * kSide];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sum[i][j] = fmaf(left, own[j], sum[i][j]);
      }
    }
    syncBlock();
  }
}

template <GemmForm form, class T>
__global__ void plainKernel(Gemm g) {
  QLORA_SHARED_ARRAY(float, tileA, kDepth* kRow);
  QLORA_SHARED_ARRAY(float, tileB, kDepth* kRow);
  const int64_t firstM = int64_t{blockIdx.y} * kTile, firstN = int64_t{blockIdx.x} * kTile;
  const int y = static_cast<int>(threadIdx.x) / kSide, x = static_cast<int>(threadIdx.x) % kSide;
  float sum[kOwn][kOwn] = {};
  if (g.extra.K > 0) {
    addProduct<form, T>(g.extra.a, g.extra.b, firstM, g.M, firstN, g.N, g.extra.K, tileA, tileB, sum);
    if (g.extra.dropout.p > 0) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int64_t at = g.extra.maskAt(firstM + y + i * kSide, firstN + x + j * kSide);
          sum[i][j] *= dropoutFactor(g.extra.dropout, at);
        }
      }
    }
  }
  addProduct<form, T>(g.a, g.b, firstM, g.M, firstN, g.N, g.K, tileA, tileB, sum);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t m = firstM + y + i * kSide;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t n = firstN + x + j * kSide;
      if (m < g.M && n < g.N) g.out.store(m, n, sum[i][j]);
    }
  }
}

template <class T>
auto kernelOf(GemmForm form) {
  switch (form) {
    case GemmForm::nt:
      return plainKernel<GemmForm::nt, T>;
    case GemmForm::nn:
      return plainKernel<GemmForm::nn, T>;
    default:
      return plainKernel<GemmForm::tn, T>;
  }
}

}  // namespace

void gemmPlain(Context& context, const Gemm& g) {
  const dim3 grid(static_cast<unsigned>((g.N + kTile - 1) / kTile), static_cast<unsigned>((g.M + kTile - 1) / kTile));
  dispatchFloat(g.compute,
                [&](auto zero) { launch(context, kernelOf<decltype(zero)>(g.form), grid, kSide* kSide, 0, g); });
}

}  // namespace qlora::cuda
