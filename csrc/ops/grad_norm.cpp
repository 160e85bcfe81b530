#include "ops/grad_norm.h"

#include <cmath>

#include "simd/tensor_list.h"

namespace qlora::QLORA_ISA {

namespace {

/// In 16 partial sums, as laneSum, but in fp64: squares of large gradients overflow fp32.
double sumOfSquares(const float* x, int64_t n) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

void gradNorm(Context& context, const GradNorm& a) {
  const Pieces pieces = cutIntoPieces(context, a.grads);
  double* partial = context.scratch.take<double>(pieces.count);
  context.pool.parallelFor(pieces.count, [&](int64_t i, int) {
    const Piece& piece = pieces.data[i];
    partial[i] = sumOfSquares(a.grads[piece.tensor].data<float>() + piece.begin, piece.count);
  });
  double sum = 0;
  for (int64_t i = 0; i < pieces.count; ++i) sum += partial[i];
  float* out = a.out.data<float>();
  out[0] = static_cast<float>(std::sqrt(sum));
  out[1] = std::isfinite(out[0]) ? 1.0f : 0.0f;
}

}  // namespace qlora::QLORA_ISA
