#include "ops/low_rank.h"

#include <algorithm>
#include <cmath>

namespace qlora::QLORA_ISA {

namespace {

constexpr int64_t kColumnsPerTask = 2048;
constexpr int kLanes64 = 8;
/// Of a row's length, below which nothing but rounding is left of it.
constexpr double kNothing = 1e-6;
constexpr int kMostSweeps = 40;

double dot(const float* a, const float* b, int64_t n) {
  double lanes[kLanes64] = {};
  int64_t i = 0;
  for (; i + kLanes64 <= n; i += kLanes64) {
    for (int l = 0; l < kLanes64; ++l) lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

/// Takes off row i what it has in common with the rows before it.
void project(ThreadPool& pool, float* y, int64_t i, int64_t K, double* common) {
  float* row = y + i * K;
  pool.parallelFor(i, [&](int64_t j, int) { common[j] = dot(row, y + j * K, K); });
  pool.parallelFor((K + kColumnsPerTask - 1) / kColumnsPerTask, [&](int64_t task, int) {
    const int64_t from = task * kColumnsPerTask, to = std::min(K, from + kColumnsPerTask);
    double sum[kColumnsPerTask] = {};
    for (int64_t j = 0; j < i; ++j) {
      const float* other = y + j * K;
      for (int64_t k = from; k < to; ++k) sum[k - from] += common[j] * static_cast<double>(other[k]);
    }
    for (int64_t k = from; k < to; ++k) row[k] = static_cast<float>(static_cast<double>(row[k]) - sum[k - from]);
  });
}

/// Turns rows p and q of the symmetric matrix `a` and of `vectors` so that a[p][q] becomes 0.
void rotate(double* a, double* vectors, int64_t L, int64_t p, int64_t q) {
  const double apq = a[p * L + q];
  if (apq == 0) return;
  const double theta = (a[q * L + q] - a[p * L + p]) / (2 * apq);
  const double t = (theta >= 0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
  const double c = 1 / std::sqrt(t * t + 1), s = t * c;
  for (int64_t k = 0; k < L; ++k) {
    const double x = a[p * L + k], z = a[q * L + k];
    a[p * L + k] = c * x - s * z;
    a[q * L + k] = s * x + c * z;
  }
  for (int64_t k = 0; k < L; ++k) {
    const double x = a[k * L + p], z = a[k * L + q];
    a[k * L + p] = c * x - s * z;
    a[k * L + q] = s * x + c * z;
  }
  for (int64_t k = 0; k < L; ++k) {
    const double x = vectors[p * L + k], z = vectors[q * L + k];
    vectors[p * L + k] = c * x - s * z;
    vectors[q * L + k] = s * x + c * z;
  }
}

/// Eigenvalues of the symmetric matrix `a` [L, L], on its diagonal afterwards, and eigenvectors, the rows of `vectors`.
void diagonalize(double* a, double* vectors, int64_t L) {
  for (int64_t i = 0; i < L * L; ++i) vectors[i] = i % (L + 1) == 0 ? 1 : 0;
  for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
    double beside = 0, on = 0;
    for (int64_t i = 0; i < L * L; ++i) (i % (L + 1) == 0 ? on : beside) += a[i] * a[i];
    if (!(beside > 1e-28 * on)) return;
    for (int64_t p = 0; p < L; ++p) {
      for (int64_t q = p + 1; q < L; ++q) rotate(a, vectors, L, p, q);
    }
  }
}

}  // namespace

void orthonormalizeRows(Context& context, const OrthonormalizeRows& a) {
  const int64_t L = a.x.dim(0), K = a.x.dim(1);
  float* y = a.y.data<float>();
  std::copy_n(a.x.data<float>(), L * K, y);
  double* common = context.scratch.take<double>(L);
  for (int64_t i = 0; i < L; ++i) {
    float* row = y + i * K;
    const double before = std::sqrt(dot(row, row, K));
    project(context.pool, y, i, K, common);
    project(context.pool, y, i, K, common);
    const double length = std::sqrt(dot(row, row, K));
    const double factor = length > kNothing * before ? 1 / length : 0;
    for (int64_t k = 0; k < K; ++k) row[k] = static_cast<float>(static_cast<double>(row[k]) * factor);
  }
}

void singularFactors(Context& context, const SingularFactors& a) {
  const int64_t L = a.gram.dim(0), R = a.left.dim(0);
  double* values = context.scratch.take<double>(L * L);
  double* vectors = context.scratch.take<double>(L * L);
  const float* gram = a.gram.data<float>();
  for (int64_t i = 0; i < L; ++i) {
    for (int64_t j = 0; j < L; ++j) {
      values[i * L + j] = (static_cast<double>(gram[i * L + j]) + static_cast<double>(gram[j * L + i])) / 2;
    }
  }
  diagonalize(values, vectors, L);
  int64_t* order = context.scratch.take<int64_t>(L);
  const auto valueOf = [&](int64_t i) { return values[i * (L + 1)]; };
  for (int64_t i = 0; i < L; ++i) {
    int64_t at = i;
    while (at > 0 && valueOf(order[at - 1]) < valueOf(i)) {
      order[at] = order[at - 1];
      --at;
    }
    order[at] = i;
  }
  const double largest = L > 0 ? std::sqrt(std::max(0.0, valueOf(order[0]))) : 0;
  for (int64_t i = 0; i < R; ++i) {
    float* left = a.left.data<float>() + i * L;
    float* right = a.right.data<float>() + i * L;
    const double s = i < L ? std::sqrt(std::max(0.0, valueOf(order[i]))) : 0;
    const bool counts = s > kNothing * largest;
    const double up = counts ? std::sqrt(s / static_cast<double>(a.scale)) : 0;
    const double down = counts ? 1 / std::sqrt(s * static_cast<double>(a.scale)) : 0;
    for (int64_t k = 0; k < L; ++k) {
      const double p = counts ? vectors[order[i] * L + k] : 0;
      left[k] = static_cast<float>(p * down);
      right[k] = static_cast<float>(p * up);
    }
  }
}

}  // namespace qlora::QLORA_ISA
