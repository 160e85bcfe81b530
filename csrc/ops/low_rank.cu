// Sums in fp64 and fixed trees. A row is orthogonalized by launches of its own: the matrices have some dozens of rows.
// The small matrix of singularFactors is one block's work.
#include "ops/low_rank.h"

#include "cuda/device.h"

namespace qlora::cuda {

namespace {

/// Of a row's length, below which nothing but rounding is left of it.
constexpr double kNothing = 1e-6;
constexpr int kMostSweeps = 40;
constexpr int kJacobiThreads = 128;

QLORA_DEVICE double blockDot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return blockReduce(sum, 0.0, Sum{});
}

/// common[j] = row i . row j for j = blockIdx.x.
__global__ void dotKernel(int64_t i, int64_t K, const float* y, double* common) {
  const double sum = blockDot(y + i * K, y + blockIdx.x * K, K);
  if (threadIdx.x == 0) common[blockIdx.x] = sum;
}

/// Takes off row i what it has in common with the rows before it. A thread has columns.
__global__ void projectKernel(int64_t i, int64_t K, const double* common, float* y) {
  for (int64_t k = threadIndex(); k < K; k += threadCount()) {
    double sum = 0;
    for (int64_t j = 0; j < i; ++j) sum += common[j] * static_cast<double>(y[j * K + k]);
    y[i * K + k] = static_cast<float>(static_cast<double>(y[i * K + k]) - sum);
  }
}

/// *before = the row's length. One block.
__global__ void lengthKernel(int64_t K, const float* row, double* before) {
  const double squares = blockDot(row, row, K);
  if (threadIdx.x == 0) *before = sqrt(squares);
}

/// To length 1, or to 0 where little is left of *before. One block.
__global__ void normalizeKernel(int64_t K, const double* before, float* row) {
  const double length = sqrt(blockDot(row, row, K));
  const double factor = length > kNothing * *before ? 1 / length : 0;
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
    row[k] = static_cast<float>(static_cast<double>(row[k]) * factor);
  }
}

/// (x, z) turned by the angle whose cosine and sine are c and s.
QLORA_DEVICE void turn(double& x, double& z, double c, double s) {
  const double before = x;
  x = c * before - s * z;
  z = s * before + c * z;
}

/// Turns rows p and q of the symmetric matrix `a` and of `vectors` so that a[p][q] becomes 0. By the whole block.
QLORA_DEVICE void rotate(double* a, double* vectors, int64_t L, int64_t p, int64_t q) {
  const double apq = a[p * L + q], app = a[p * L + p], aqq = a[q * L + q];
  syncBlock();  // before anyone changes what others read here
  if (apq != 0) {
    const double theta = (aqq - app) / (2 * apq);
    const double t = (theta >= 0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1));
    const double c = 1 / sqrt(t * t + 1), s = t * c;
    for (int64_t k = threadIdx.x; k < L; k += blockDim.x) {
      turn(a[p * L + k], a[q * L + k], c, s);
      turn(vectors[p * L + k], vectors[q * L + k], c, s);
    }
    syncBlock();
    for (int64_t k = threadIdx.x; k < L; k += blockDim.x) turn(a[k * L + p], a[k * L + q], c, s);
  } else {
    syncBlock();
  }
  syncBlock();
}

/// left and right of singularFactors from gram. One block.
__global__ void factorsKernel(int64_t L, int64_t R, const float* gram, float scale, double* a, double* vectors,
                              int64_t* order, float* left, float* right) {
  for (int64_t i = threadIdx.x; i < L * L; i += blockDim.x) {
    a[i] = (static_cast<double>(gram[i]) + static_cast<double>(gram[i % L * L + i / L])) / 2;
    vectors[i] = i % (L + 1) == 0 ? 1 : 0;
  }
  syncBlock();
  for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
    double beside = 0, on = 0;
    for (int64_t i = threadIdx.x; i < L * L; i += blockDim.x) (i % (L + 1) == 0 ? on : beside) += a[i] * a[i];
    beside = blockReduce(beside, 0.0, Sum{});
    on = blockReduce(on, 0.0, Sum{});
    if (!(beside > 1e-28 * on)) break;
    for (int64_t p = 0; p < L; ++p) {
      for (int64_t q = p + 1; q < L; ++q) rotate(a, vectors, L, p, q);
    }
  }
  if (threadIdx.x == 0) {
    for (int64_t i = 0; i < L; ++i) {
      int64_t at = i;
      for (; at > 0 && a[order[at - 1] * (L + 1)] < a[i * (L + 1)]; --at) order[at] = order[at - 1];
      order[at] = i;
    }
  }
  syncBlock();
  const auto singular = [&](int64_t i) { return sqrt(fmax(0.0, a[order[i] * (L + 1)])); };
  const double largest = L > 0 ? singular(0) : 0;
  for (int64_t at = threadIdx.x; at < R * L; at += blockDim.x) {
    const int64_t i = at / L;
    const double s = i < L ? singular(i) : 0;
    const bool counts = s > kNothing * largest;
    const double p = counts ? vectors[order[i] * L + at % L] : 0;
    left[at] = static_cast<float>(counts ? p / sqrt(s * static_cast<double>(scale)) : 0);
    right[at] = static_cast<float>(counts ? p * sqrt(s / static_cast<double>(scale)) : 0);
  }
}

}  // namespace

void orthonormalizeRows(Context& context, const OrthonormalizeRows& a) {
  const int64_t L = a.x.dim(0), K = a.x.dim(1);
  float* y = a.y.data<float>();
  auto* common = context.scratch.take<double>(L);
  auto* before = context.scratch.take<double>(1);
  copyBytes(context, y, a.x.data<float>(), static_cast<size_t>(L * K) * sizeof(float));
  for (int64_t i = 0; i < L; ++i) {
    float* row = y + i * K;
    launch(context, lengthKernel, 1, kThreads, 0, K, row, before);
    for (int again = 0; again < 2; ++again) {
      launch(context, dotKernel, i, kThreads, 0, i, K, y, common);
      launch(context, projectKernel, blocksFor(K), kThreads, 0, i, K, common, y);
    }
    launch(context, normalizeKernel, 1, kThreads, 0, K, before, row);
  }
}

void singularFactors(Context& context, const SingularFactors& a) {
  const int64_t L = a.gram.dim(0), R = a.left.dim(0);
  auto* values = context.scratch.take<double>(L * L);
  auto* vectors = context.scratch.take<double>(L * L);
  auto* order = context.scratch.take<int64_t>(L);
  launch(context, factorsKernel, 1, kJacobiThreads, 0, L, R, a.gram.data<float>(), a.scale, values, vectors, order,
         a.left.data<float>(), a.right.data<float>());
}

}  // namespace qlora::cuda
