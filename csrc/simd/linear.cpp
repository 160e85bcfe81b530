#include "simd/linear.h"

#include <algorithm>

#include "simd/rows.h"

namespace qlora::QLORA_ISA {

namespace {

constexpr float kOutlier = 6.0f;
constexpr float kInverse16129 = 1.0f / 16129.0f;
constexpr int64_t kRowsPerTask = 8;
// Outlier columns of W that are held dequantized at a time.
constexpr int64_t kColumnsAtOnce = 256;

const float* biasAsFloat(Context& context, const Tensor& bias) {
  if (!bias.defined()) return nullptr;
  if (bias.dtype == DType::f32) return bias.data<float>();
  const int64_t N = bias.size();
  float* out = context.scratch.take<float>(N);
  dispatchFloat(bias.dtype, [&](auto zero) {
    const auto* from = bias.data<decltype(zero)>();
    for (int64_t n = 0; n < N; ++n) out[n] = toFloat(from[n]);
  });
  return out;
}

/// To the nearest integer, ties to even, for |x| < 2^22.
QLORA_INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

float roundToHalf(float x) { return toFloat(fromFloat<f16>(x)); }

struct IntegerRows {
  int8_t* codes;     // [M, K]
  float* absmax;     // [M]
  int32_t* columns;  // the outlier columns, ascending
  int64_t columnCount;
};

IntegerRows quantizeRows(Context& context, const Tensor& x, int64_t M, int64_t K) {
  IntegerRows rows{context.scratch.take<int8_t>(M * K), context.scratch.take<float>(M),
                   context.scratch.take<int32_t>(K), 0};
  const int threads = context.pool.size();
  auto* seen = context.scratch.take<uint8_t>(threads * K);
  auto* lines = context.scratch.take<float>(threads * K);
  std::fill_n(seen, threads * K, uint8_t{0});
  const int64_t tasks = (M + kRowsPerTask - 1) / kRowsPerTask;
  dispatchFloat(x.dtype, [&](auto zero) {
    const auto* from = x.data<decltype(zero)>();
    context.pool.parallelFor(tasks, [&](int64_t task, int thread) {
      float* line = lines + thread * K;
      uint8_t* outlier = seen + thread * K;
      for (int64_t m = task * kRowsPerTask; m < std::min(M, (task + 1) * kRowsPerTask); ++m) {
        float absmax = 0;
        for (int64_t k = 0; k < K; ++k) {
          const float a = roundToHalf(toFloat(from[m * K + k]));
          const bool big = __builtin_fabsf(a) >= kOutlier;
          outlier[k] |= static_cast<uint8_t>(big);
          line[k] = big ? 0.0f : a;
          absmax = std::max(absmax, __builtin_fabsf(line[k]));
        }
        rows.absmax[m] = absmax;
        const float scale = absmax > 0 ? 127.0f * (1.0f / absmax) : 0.0f;
        int8_t* code = rows.codes + m * K;
        for (int64_t k = 0; k < K; ++k) code[k] = static_cast<int8_t>(nearest(line[k] * scale));
      }
    });
  });
  for (int64_t k = 0; k < K; ++k) {
    bool outlier = false;
    for (int thread = 0; thread < threads; ++thread) outlier |= seen[thread * K + k] != 0;
    if (outlier) rows.columns[rows.columnCount++] = static_cast<int32_t>(k);
  }
  if (rows.columnCount > 0) {
    context.pool.parallelFor(tasks, [&](int64_t task, int) {
      for (int64_t m = task * kRowsPerTask; m < std::min(M, (task + 1) * kRowsPerTask); ++m) {
        for (int64_t c = 0; c < rows.columnCount; ++c) rows.codes[m * K + rows.columns[c]] = 0;
      }
    });
  }
  return rows;
}

/// gemm whose packed operands are handed back before the next one's are taken.
void gemmAlone(Context& context, const Gemm& g) {
  Scratch scratch = context.scratch.nested();
  Context own{context.pool, scratch};
  gemm(own, g);
}

/// sum += x[:, columns] W[:, columns]^T in fp16; a [M, most] and b [N, most] take the columns, `most` at a time.
void addOutliers(Context& context, const Tensor& x, const Weight& weight, const IntegerRows& rows, int64_t M,
                 int64_t most, float* a, float* b, float* sum) {
  const int64_t N = weight.N, K = weight.K;
  const int8_t* q = weight.data.data<int8_t>();
  const float* absmax = weight.absmax.data<float>();
  for (int64_t begin = 0; begin < rows.columnCount; begin += most) {
    const int64_t count = std::min(most, rows.columnCount - begin);
    const int32_t* columns = rows.columns + begin;
    dispatchFloat(x.dtype, [&](auto zero) {
      const auto* from = x.data<decltype(zero)>();
      context.pool.parallelFor(M, [&](int64_t m, int) {
        for (int64_t c = 0; c < count; ++c) a[m * count + c] = roundToHalf(toFloat(from[m * K + columns[c]]));
      });
    });
    context.pool.parallelFor(N, [&](int64_t n, int) {
      for (int64_t c = 0; c < count; ++c) {
        b[n * count + c] = roundToHalf(static_cast<float>(q[n * K + columns[c]]) * absmax[n] * kInverse127);
      }
    });
    gemmAlone(context, {.form = GemmForm::nt,
                        .compute = DType::f16,
                        .M = M,
                        .N = N,
                        .K = count,
                        .a = {a, DType::f32, count},
                        .b = {b, DType::f32, count},
                        .c = sum,
                        .cDtype = DType::f32,
                        .cStride = N,
                        .store = GemmStore::add});
  }
}

}  // namespace

void linearForward(Context& context, const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& y,
                   const GemmExtra& extra, const PackedA* packed) {
  const int64_t M = leading(x), N = weight.N, K = weight.K;
  const float* biasRow = biasAsFloat(context, bias);
  if (weight.data.dtype != DType::i8) {
    GemmOperand w{nullptr, DType::f32, K, &weight};
    gemm(context, {.form = GemmForm::nt,
                   .compute = x.dtype,
                   .M = M,
                   .N = N,
                   .K = K,
                   .a = matrix(x),
                   .b = w,
                   .c = y.data<void>(),
                   .cDtype = y.dtype,
                   .cStride = N,
                   .bias = biasRow,
                   .extra = extra,
                   .packed = packed});
    return;
  }
  const IntegerRows rows = quantizeRows(context, x, M, K);
  const bool inPlace = y.dtype == DType::f32;
  float* sum = inPlace ? y.data<float>() : context.scratch.take<float>(M * N);
  // Taken whether or not there are outliers: how much memory is needed must not depend on the numbers.
  const int64_t most = std::min(K, kColumnsAtOnce);
  float* a = context.scratch.take<float>(M * most);
  float* b = context.scratch.take<float>(N * most);
  // Codes are below 2^8, so bf16 holds them and fp32 their products and sums.
  gemmAlone(context, {.form = GemmForm::nt,
                      .compute = DType::bf16,
                      .M = M,
                      .N = N,
                      .K = K,
                      .a = {rows.codes, DType::i8, K},
                      .b = {weight.data.data<void>(), DType::i8, K},
                      .c = sum,
                      .cDtype = DType::f32,
                      .cStride = N,
                      .alpha = kInverse16129,
                      .bias = biasRow,
                      .rowScale = rows.absmax,
                      .columnScale = weight.absmax.data<float>()});
  if (rows.columnCount > 0) addOutliers(context, x, weight, rows, M, most, a, b, sum);
  if (extra.K > 0) {
    gemm(context, {.form = GemmForm::nt,
                   .compute = x.dtype,
                   .M = M,
                   .N = N,
                   .K = 0,
                   .a = {},
                   .b = {},
                   .c = sum,
                   .cDtype = DType::f32,
                   .cStride = N,
                   .store = GemmStore::add,
                   .extra = extra});
  }
  if (inPlace) return;
  dispatchFloat(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = y.data<T>();
    context.pool.parallelFor(M, [&](int64_t m, int) {
      for (int64_t n = 0; n < N; ++n) out[m * N + n] = fromFloat<T>(sum[m * N + n]);
    });
  });
}

}  // namespace qlora::QLORA_ISA
