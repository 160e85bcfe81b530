#include "ops/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd/activation.h"
#include "simd/gemm.h"
#include "simd/lanes.h"
#include "simd/largest.h"

namespace qlora::QLORA_ISA {

namespace {

// Rows at a time: logits of 64 MiB, but so many that reading the weight is paid for, and whole strips of the matmul.
constexpr int64_t kLogitsPerChunk = 16 << 20, kRowsPerChunk = 128, kRowUnit = 32;
constexpr int64_t kSumBlock = 1024;           // logits summed in fp32 before they go into an fp64 sum

/// The rows whose label counts, in order; throws where a label is no row of the vocabulary.
int64_t gatherRows(const LinearCrossEntropy& a, int64_t M, int64_t* rows) {
  const int32_t* labels = a.labels.data<int32_t>();
  int64_t count = 0;
  for (int64_t i = 0; i < M; ++i) {
    if (labels[i] == kIgnoredLabel) continue;
    if (labels[i] < 0 || labels[i] >= a.weight.N) {
      fail("ERR_QLORA_TOKEN_ID", "linearCrossEntropy: label %d at position %lld is outside the vocabulary of %lld",
           labels[i], static_cast<long long>(i), static_cast<long long>(a.weight.N));
    }
    rows[count++] = i;
  }
  return count;
}

void softCapRow(float* z, int64_t V, float cap) {
  for (int64_t v = 0; v < V; ++v) z[v] = cap * fastTanh(z[v] / cap);
}

double logSumExp(const float* z, int64_t V, float largest) {
  double sum = 0;
  for (int64_t begin = 0; begin < V; begin += kSumBlock) {
    const int64_t n = std::min(kSumBlock, V - begin);
    sum += static_cast<double>(laneSum(n, [&](int64_t i) { return fastExp(z[begin + i] - largest); }));
  }
  return static_cast<double>(largest) + std::log(sum);
}

/// z becomes the gradient of its row's loss with respect to the logits before the cap.
void gradientRow(float* z, int64_t V, float logSum, int32_t label, float cap) {
  const float atLabel = z[label];
  // The label's element is 1 less: expm1, since e^x - 1 cancels where the model is sure.
  if (cap > 0) {
    for (int64_t v = 0; v < V; ++v) z[v] = fastExp(z[v] - logSum) * (1.0f - (z[v] / cap) * (z[v] / cap));
    z[label] = std::expm1(atLabel - logSum) * (1.0f - (atLabel / cap) * (atLabel / cap));
  } else {
    for (int64_t v = 0; v < V; ++v) z[v] = fastExp(z[v] - logSum);
    z[label] = std::expm1(atLabel - logSum);
  }
}

/// gemm whose packed operands are handed back before the next one's are taken.
void gemmAlone(Context& context, const Gemm& g) {
  Scratch scratch = context.scratch.nested();
  Context own{context.pool, scratch};
  gemm(own, g);
}

}  // namespace

void linearCrossEntropy(Context& context, const LinearCrossEntropy& a) {
  const int64_t M = a.h.rows(), V = a.weight.N, C = a.weight.K;
  const size_t rowBytes = static_cast<size_t>(C) * sizeOf(a.h.dtype);
  const int32_t* labels = a.labels.data<int32_t>();
  int64_t* rows = context.scratch.take<int64_t>(M);
  const int64_t count = gatherRows(a, M, rows);

  const int64_t most = std::max(kRowsPerChunk, kLogitsPerChunk / std::max<int64_t>(V, 1));
  const int64_t chunks = (count + most - 1) / most, even = chunks ? (count + chunks - 1) / chunks : 0;
  const int64_t perChunk = std::min(count, (even + kRowUnit - 1) / kRowUnit * kRowUnit);
  const bool wantsGradient = a.dh.defined() || a.dweight.defined();
  float* logits = context.scratch.take<float>(perChunk * V);
  char* hChunk = context.scratch.take<char>(perChunk * static_cast<int64_t>(rowBytes));
  char* dhChunk = a.dh.defined() ? context.scratch.take<char>(perChunk * static_cast<int64_t>(rowBytes)) : nullptr;
  double* rowLoss = context.scratch.take<double>(count);
  float* bias = nullptr;
  if (a.bias.defined()) {
    bias = context.scratch.take<float>(V);
    dispatchFloat(a.bias.dtype, [&](auto zero) {
      const auto* from = a.bias.data<decltype(zero)>();
      for (int64_t v = 0; v < V; ++v) bias[v] = toFloat(from[v]);
    });
  }
  const float gradientScale = a.lossScale.defined() ? a.scale * *a.lossScale.data<float>() : a.scale;
  const char* h = a.h.data<char>();
  char* dh = a.dh.dataOrNull<char>();
  if (dh) std::memset(dh, 0, static_cast<size_t>(M) * rowBytes);

  const DType T = a.h.dtype;
  const GemmOperand weight{a.weight.data.data<void>(), a.weight.data.dtype, C, &a.weight};
  for (int64_t first = 0; first < count; first += perChunk) {
    const int64_t m = std::min(perChunk, count - first);
    for (int64_t i = 0; i < m; ++i) std::memcpy(hChunk + i * rowBytes, h + rows[first + i] * rowBytes, rowBytes);
    const GemmOperand hRows{hChunk, T, C}, dlogits{logits, DType::f32, V};
    gemmAlone(context, {.form = GemmForm::nt,
                        .compute = T,
                        .M = m,
                        .N = V,
                        .K = C,
                        .a = hRows,
                        .b = weight,
                        .c = logits,
                        .cDtype = DType::f32,
                        .cStride = V,
                        .bias = bias});
    context.pool.parallelFor(m, [&](int64_t i, int) {
      float* z = logits + i * V;
      const int32_t label = labels[rows[first + i]];
      if (a.softCap > 0) softCapRow(z, V, a.softCap);
      const double logSum = logSumExp(z, V, largestOf(z, V));
      rowLoss[first + i] = logSum - static_cast<double>(z[label]);
      if (wantsGradient) gradientRow(z, V, static_cast<float>(logSum), label, a.softCap);
    });
    if (dh) {
      gemmAlone(context, {.form = GemmForm::nn,
                          .compute = T,
                          .M = m,
                          .N = C,
                          .K = V,
                          .a = dlogits,
                          .b = weight,
                          .c = dhChunk,
                          .cDtype = T,
                          .cStride = C,
                          .alpha = gradientScale});
      for (int64_t i = 0; i < m; ++i) std::memcpy(dh + rows[first + i] * rowBytes, dhChunk + i * rowBytes, rowBytes);
    }
    if (a.dweight.defined()) {
      gemmAlone(context, {.form = GemmForm::tn,
                          .compute = T,
                          .M = V,
                          .N = C,
                          .K = m,
                          .a = dlogits,
                          .b = hRows,
                          .c = a.dweight.data<void>(),
                          .cDtype = DType::f32,
                          .cStride = C,
                          .alpha = gradientScale,
                          .store = GemmStore::add});
    }
  }

  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += rowLoss[i];
  a.loss.data<float>()[0] = static_cast<float>(static_cast<double>(a.scale) * sum);
  if (a.tokenLoss.defined()) {
    float* tokenLoss = a.tokenLoss.data<float>();
    std::fill(tokenLoss, tokenLoss + M, 0.0f);
    for (int64_t i = 0; i < count; ++i) tokenLoss[rows[i]] = static_cast<float>(rowLoss[i]);
  }
}

}  // namespace qlora::QLORA_ISA
