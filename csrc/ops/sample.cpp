#include "ops/sample.h"

#include <algorithm>

#include "core/random.h"
#include "simd/lanes.h"

namespace qlora::QLORA_ISA {

namespace {

struct Candidate {
  float weight;  // e^(z - max): a probability that still lacks its divisor
  int32_t id;
};

int32_t indexOfLargest(const float* z, int64_t V) {
  const float largest = laneMax(V, [&](int64_t i) { return z[i]; });
  int64_t i = 0;
  while (z[i] != largest) ++i;
  return static_cast<int32_t>(i);
}

void checkRow(const float* z, int64_t V, int64_t row) {
  const float largest = laneMax(V, [&](int64_t i) { return z[i]; });
  const float notNumbers = laneSum(V, [&](int64_t i) { return z[i] != z[i] ? 1.0f : 0.0f; });
  if (notNumbers != 0 || __builtin_isinf(largest)) {
    fail("ERR_QLORA_NON_FINITE", "sample: the logits of row %lld are not finite numbers", static_cast<long long>(row));
  }
}

double sumOf(const Candidate* candidates, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(candidates[i].weight);
  return sum;
}

/// Keeps the candidates that top-p keeps, most likely first; returns how many.
int64_t keepTopP(Candidate* candidates, int64_t n, double topP) {
  const double total = sumOf(candidates, n), wanted = topP * total;
  // All that weigh less than an n-th part of what may be cut off can be dropped unsorted: together they are less than
  // it.
  const float least = static_cast<float>((1 - topP) * total / static_cast<double>(n) * 0.999);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (candidates[i].weight >= least) candidates[kept++] = candidates[i];
  }
  std::sort(candidates, candidates + kept, [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  });
  double before = 0;
  int64_t i = 0;
  for (; i < kept && (i == 0 || before < wanted); ++i) before += static_cast<double>(candidates[i].weight);
  return i;
}

int32_t draw(const Candidate* candidates, int64_t n, double uniform01) {
  const double wanted = uniform01 * sumOf(candidates, n);
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (candidates[i].weight == 0) continue;
    last = i;
    sum += static_cast<double>(candidates[i].weight);
    if (sum > wanted) break;
  }
  return candidates[last].id;
}

}  // namespace

void sample(Context& context, const Sample& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  const float* logits = a.logits.data<float>();
  int32_t* ids = a.ids.data<int32_t>();
  for (int64_t row = 0; row < B; ++row) checkRow(logits + row * V, V, row);
  if (a.temperature == 0) {
    context.pool.parallelFor(B, [&](int64_t row, int) { ids[row] = indexOfLargest(logits + row * V, V); });
    return;
  }
  const int64_t K = a.topK == 0 ? V : std::min<int64_t>(a.topK, V);
  float* scaledOfThread = context.scratch.take<float>(context.pool.size() * V);
  float* sortedOfThread = K < V ? context.scratch.take<float>(context.pool.size() * V) : nullptr;
  Candidate* candidatesOfThread = context.scratch.take<Candidate>(context.pool.size() * V);
  context.pool.parallelFor(B, [&](int64_t row, int thread) {
    float* z = scaledOfThread + thread * V;
    const float* x = logits + row * V;
    const float largest = laneMax(V, [&](int64_t i) { return x[i]; });
    for (int64_t i = 0; i < V; ++i) z[i] = (x[i] - largest) / a.temperature;  // at most 0, so nothing overflows
    float least = -__builtin_inff();
    if (K < V) {
      float* sorted = sortedOfThread + thread * V;
      std::copy(z, z + V, sorted);
      std::nth_element(sorted, sorted + (K - 1), sorted + V, [](float x, float y) { return x > y; });
      least = sorted[K - 1];
    }
    for (int64_t i = 0; i < V; ++i) z[i] = z[i] < least ? -1.0f : fastExp(z[i]);
    Candidate* candidates = candidatesOfThread + thread * V;
    int64_t n = 0;
    for (int64_t i = 0; i < V; ++i) {
      if (z[i] >= 0) candidates[n++] = {z[i], static_cast<int32_t>(i)};
    }
    if (a.topP < 1) n = keepTopP(candidates, n, static_cast<double>(a.topP));
    const auto words = philox(a.seed, a.stream, static_cast<uint64_t>(row));
    const uint64_t bits = (static_cast<uint64_t>(words[0]) << 32) | words[1];
    ids[row] = draw(candidates, n, static_cast<double>(bits >> 11) * 0x1p-53);
  });
}

}  // namespace qlora::QLORA_ISA
