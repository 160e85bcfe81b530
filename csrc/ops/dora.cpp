#include "ops/dora.h"

#include <algorithm>
#include <cmath>

#include "simd/lanes.h"
#include "simd/linear.h"
#include "simd/rows.h"
#include "simd/vector.h"

namespace qlora::QLORA_ISA {

namespace {

constexpr int64_t kRowsPerTask = 4;
constexpr int64_t kColumnsPerTask = 64;
constexpr int64_t kPiece = 1024;

}  // namespace

void loraRowNorm(Context& context, const LoraRowNorm& a) {
  const int64_t N = a.weight.N, K = a.weight.K, r = a.loraA.dim(0);
  const float* A = a.loraA.data<float>();
  const float* B = a.loraB.data<float>();
  float* norm = a.norm.data<float>();
  const GemmOperand w{nullptr, DType::f32, K, &a.weight};
  context.pool.parallelFor((N + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask, rows = std::min(kRowsPerTask, N - first);
    float squares[kRowsPerTask] = {};
    alignas(64) float delta[kRowsPerTask][kPiece];
    alignas(64) float line[kPiece];
    for (int64_t k = 0; k < K; k += kPiece) {
      const int64_t n = std::min(kPiece, K - k);
      for (auto& row : delta) std::fill_n(row, n, 0.0f);
      for (int64_t i = 0; i < r; ++i) {
        const float* from = A + i * K + k;
        float b[kRowsPerTask] = {};
        for (int64_t row = 0; row < rows; ++row) b[row] = B[(first + row) * r + i];
        for (int64_t c = 0; c < n; ++c) {
          for (int row = 0; row < kRowsPerTask; ++row) delta[row][c] += b[row] * from[c];
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        readNatural(w, static_cast<DType>(a.compute), first + row, k, n, line);
        squares[row] += laneSum(n, [&](int64_t c) {
          const float value = line[c] + a.scale * delta[row][c];
          return value * value;
        });
      }
    }
    for (int64_t row = 0; row < rows; ++row) norm[first + row] = std::sqrt(squares[row]);
  });
}

void doraScaleForward(Context& context, const DoraScaleForward& a) {
  const int64_t rows = leading(a.z), N = a.z.dim(-1);
  const float* magnitude = a.magnitude.data<float>();
  const float* norm = a.norm.data<float>();
  float* ratio = context.scratch.take<float>(2 * N);
  float* bias = ratio + N;
  std::fill_n(bias, N, 0.0f);
  for (int64_t n = 0; n < N; ++n) ratio[n] = magnitude[n] / norm[n];
  if (a.bias.defined()) {
    dispatchFloat(a.bias.dtype, [&](auto zero) {
      const auto* from = a.bias.data<decltype(zero)>();
      for (int64_t n = 0; n < N; ++n) bias[n] = toFloat(from[n]);
    });
  }
  dispatchFloat(a.z.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* z = a.z.data<T>();
    T* y = a.y.data<T>();
    context.pool.parallelFor(rows, [&](int64_t row, int) {
      for (int64_t n = 0; n < N; ++n) y[row * N + n] = fromFloat<T>(toFloat(z[row * N + n]) * ratio[n] + bias[n]);
    });
  });
}

void doraScaleBackward(Context& context, const DoraScaleBackward& a) {
  const int64_t rows = leading(a.z), N = a.z.dim(-1);
  const float* magnitude = a.magnitude.data<float>();
  const float* norm = a.norm.data<float>();
  float* dmagnitude = a.dmagnitude.dataOrNull<float>();
  dispatchFloat(a.z.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* z = a.z.data<T>();
    const T* dy = a.dy.data<T>();
    T* dz = a.dz.dataOrNull<T>();
    context.pool.parallelFor((N + kColumnsPerTask - 1) / kColumnsPerTask, [&](int64_t task, int) {
      const int64_t begin = task * kColumnsPerTask, count = std::min(kColumnsPerTask, N - begin);
      float sum[kColumnsPerTask] = {}, ratio[kColumnsPerTask];
      for (int64_t i = 0; i < count; ++i) ratio[i] = magnitude[begin + i] / norm[begin + i];
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * N + begin;
        for (int64_t i = 0; i < count; ++i) sum[i] += toFloat(dy[at + i]) * toFloat(z[at + i]);
        if (dz) {
          for (int64_t i = 0; i < count; ++i) dz[at + i] = fromFloat<T>(toFloat(dy[at + i]) * ratio[i]);
        }
      }
      if (dmagnitude) {
        for (int64_t i = 0; i < count; ++i) dmagnitude[begin + i] += sum[i] / norm[begin + i];
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA
