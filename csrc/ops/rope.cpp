#include "ops/rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qlora::QLORA_ISA {

namespace {

// Rows of the table and tokens a task.
constexpr int64_t kRowsPerTask = 16;

/// The heads of a row.
template <class T>
QLORA_INLINE void turnRow(int64_t H, int64_t D, int64_t half, const T* x, const float* c, const float* s,
                          float direction, T* y) {
  for (int64_t h = 0; h < H; ++h) {
    const T* xi = x + h * D;
    T* __restrict yi = y + h * D;
    for (int64_t r = 0; r < half; ++r) {
      const float first = toFloat(xi[r]), second = toFloat(xi[r + half]), sine = direction * s[r];
      yi[r] = fromFloat<T>(first * c[r] - second * sine);
      yi[r + half] = fromFloat<T>(second * c[r] + first * sine);
    }
    for (int64_t d = 2 * half; d < D; ++d) yi[d] = xi[d];
  }
}

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
        turnRow(H, D, half, x + m * H * D, cosines + m * half, sines + m * half, a.direction, y + m * H * D);
      }
    });
  });
}

void ropeAppend(Context& context, const RopeAppend& a) {
  const int64_t B = a.q.dim(0), T = a.q.dim(1), H = a.q.dim(2), G = a.k.dim(2), D = a.q.dim(3);
  const int64_t M = B * T, S = a.keys.dim(1), half = a.cos.dim(1);
  const float* cosines = a.cos.data<float>();
  const float* sines = a.sin.data<float>();
  const int32_t* at = a.at.data<int32_t>();
  for (int64_t b = 0; b < B; ++b) a.checkPlace(at[b]);
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using E = decltype(zero);
    const E *q = a.q.data<E>(), *k = a.k.data<E>(), *v = a.v.data<E>();
    E *turned = a.turned.data<E>(), *keys = a.keys.data<E>(), *values = a.values.data<E>();
    context.pool.parallelFor((M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
      for (int64_t m = task * kRowsPerTask; m < std::min(M, (task + 1) * kRowsPerTask); ++m) {
        const float *c = cosines + m * half, *s = sines + m * half;
        const int64_t from = m * G * D, to = (m / T * S + at[m / T] + m % T) * G * D;
        turnRow(H, D, half, q + m * H * D, c, s, 1, turned + m * H * D);
        turnRow(G, D, half, k + from, c, s, 1, keys + to);
        std::memcpy(values + to, v + from, static_cast<size_t>(G * D) * sizeof(E));
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA
