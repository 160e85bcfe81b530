#include "ops/rope.h"

#include <algorithm>
#include <cmath>

namespace qlora::QLORA_ISA {

namespace {

// Rows of the table and tokens a task.
constexpr int64_t kRowsPerTask = 16;

}  // namespace

void ropeTable(Context& context, const RopeTable& a) {
  const int64_t M = a.positions.dim(0), half = a.inverseFrequencies.dim(0);
  const int32_t* positions = a.positions.data<int32_t>();
  const float* frequencies = a.inverseFrequencies.data<float>();
  float* cosines = a.cos.data<float>();
  float* sines = a.sin.data<float>();
  context.pool.parallelFor((M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t m = task * kRowsPerTask; m < std::min(M, (task + 1) * kRowsPerTask); ++m) {
      for (int64_t r = 0; r < half; ++r) {
        const float angle = static_cast<float>(positions[m]) * frequencies[r];
        cosines[m * half + r] = cosf(angle) * a.factor;
        sines[m * half + r] = sinf(angle) * a.factor;
      }
    }
  });
}

void rope(Context& context, const Rope& a) {
  const int64_t H = a.x.dim(-2), D = a.x.dim(-1), M = a.cos.dim(0), half = a.cos.dim(1);
  const float* cosines = a.cos.data<float>();
  const float* sines = a.sin.data<float>();
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = a.x.data<T>();
    T* y = a.y.data<T>();
    context.pool.parallelFor((M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
      for (int64_t m = task * kRowsPerTask; m < std::min(M, (task + 1) * kRowsPerTask); ++m) {
        const float* c = cosines + m * half;
        const float* s = sines + m * half;
        for (int64_t h = 0; h < H; ++h) {
          const T* xi = x + (m * H + h) * D;
          T* __restrict yi = y + (m * H + h) * D;
          for (int64_t r = 0; r < half; ++r) {
            const float first = toFloat(xi[r]), second = toFloat(xi[r + half]), sine = a.direction * s[r];
            yi[r] = fromFloat<T>(first * c[r] - second * sine);
            yi[r + half] = fromFloat<T>(second * c[r] + first * sine);
          }
          for (int64_t d = 2 * half; d < D; ++d) yi[d] = xi[d];
        }
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA
