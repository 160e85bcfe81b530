#include "ops/logits_process.h"

#include <algorithm>
#include <cmath>

namespace qlora::QLORA_ISA {

namespace {

constexpr float kForbidden = -__builtin_inff();
// Below it nothing but the largest logit has a chance, and a division by less might overflow.
constexpr float kLeastTemperature = 1e-30f;

struct Candidate {
  float z;
  float weight;    // e^(z - max): a probability that still lacks its divisor
  float distance;  // of typical-p
  int32_t id;
};

double sumOfWeights(const Candidate* candidates, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(candidates[i].weight);
  return sum;
}

/// Moves what top-p keeps to the front, most likely first; returns how many.
int64_t keepTopP(Candidate* candidates, int64_t n, double topP, int64_t keep) {
  const double total = sumOfWeights(candidates, n), wanted = topP * total;
  // All that weigh less than an n-th part of what may be cut off can be dropped unsorted: together they are less than
  // it. Where more than one has to stay, they might be among those.
  const float least = keep > 1 ? 0.0f : static_cast<float>((1 - topP) * total / static_cast<double>(n) * 0.999);
  int64_t sorted = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (candidates[i].weight >= least) candidates[sorted++] = candidates[i];
  }
  std::sort(candidates, candidates + sorted,
            [](const Candidate& a, const Candidate& b) { return a.z != b.z ? a.z > b.z : a.id < b.id; });
  double before = 0;
  int64_t i = 0;
  for (; i < sorted && (i < keep || before < wanted); ++i) before += static_cast<double>(candidates[i].weight);
  return i;
}

/// Moves what typical-p keeps to the front, most typical first; returns how many.
int64_t keepTypical(Candidate* candidates, int64_t n, float largest, double typicalP, int64_t keep) {
  const double total = sumOfWeights(candidates, n), logTotal = std::log(total);
  double entropy = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double logP = static_cast<double>(candidates[i].z - largest) - logTotal;
    entropy -= static_cast<double>(candidates[i].weight) / total * logP;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double logP = static_cast<double>(candidates[i].z - largest) - logTotal;
    candidates[i].distance = static_cast<float>(std::fabs(-logP - entropy));
  }
  std::sort(candidates, candidates + n, [](const Candidate& a, const Candidate& b) {
    return a.distance != b.distance ? a.distance < b.distance : a.id < b.id;
  });
  const double wanted = typicalP * total;
  double sum = static_cast<double>(candidates[0].weight);
  int64_t last = 0;
  while (last + 1 < n && sum < wanted) sum += static_cast<double>(candidates[++last].weight);
  int64_t kept = last + 1;
  while (kept < n && candidates[kept].distance == candidates[last].distance) ++kept;
  return std::min(n, std::max(kept, keep));
}

void forbidRepeats(const int32_t* seen, int64_t length, int64_t n, float* z) {
  const int32_t* prefix = seen + length - (n - 1);
  for (int64_t i = 0; i + n <= length; ++i) {
    int64_t same = 0;
    while (same < n - 1 && seen[i + same] == prefix[same]) ++same;
    if (same == n - 1) z[seen[i + n - 1]] = kForbidden;
  }
}

struct Seen {
  const int32_t* ids;
  int64_t length;
};

Seen seenBy(const ConstrainLogits& a, int64_t row) {
  Seen seen{a.seen.data<int32_t>() + row * a.seen.dim(1), a.seenLength};
  for (; seen.length > 0 && *seen.ids == -1; --seen.length) ++seen.ids;
  return seen;
}

void checkTokenIds(const char* what, const int32_t* ids, int64_t n, int64_t V) {
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= V) {
      fail("ERR_QLORA_TOKEN_ID", "constrainLogits: %s[%lld] must be from 0 to %lld, got %d", what,
           static_cast<long long>(i), static_cast<long long>(V - 1), ids[i]);
    }
  }
}

}  // namespace

void logSoftmax(Context& context, const LogSoftmax& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  const float* logits = a.logits.data<float>();
  float* out = a.out.data<float>();
  checkSomeLogit("logSoftmax", logits, B, V);
  context.pool.parallelFor(B, [&](int64_t row, int) {
    const float* x = logits + row * V;
    const float largest = largestLogit(x, V);
    const float sum = laneSum(V, [&](int64_t i) { return fastExp(x[i] - largest); });
    const float logSum = std::log(sum);
    for (int64_t i = 0; i < V; ++i) out[row * V + i] = (x[i] - largest) - logSum;
  });
}

void constrainLogits(Context& context, const ConstrainLogits& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  const float* logits = a.logits.data<float>();
  float* out = a.out.data<float>();
  checkLogits("constrainLogits", logits, B, V);
  if (a.forbidden.defined()) {
    checkTokenIds("forbidden", a.forbidden.data<int32_t>(), a.forbidden.dim(0), V);
  }
  for (int64_t row = 0; a.seen.defined() && row < B; ++row) {
    const Seen seen = seenBy(a, row);
    checkTokenIds("seen", seen.ids, seen.length, V);
  }
  context.pool.parallelFor(B, [&](int64_t row, int) {
    const float* x = logits + row * V;
    float* z = out + row * V;
    std::copy(x, x + V, z);
    if (a.seen.defined()) {
      const auto [seen, length] = seenBy(a, row);
      // From x, so that a token that was seen twice is penalized once.
      for (int64_t i = 0; i < length && a.repetitionPenalty != 1; ++i) {
        const float score = x[seen[i]];
        z[seen[i]] = score < 0 ? score * a.repetitionPenalty : score / a.repetitionPenalty;
      }
      if (a.ngramSize > 0 && length >= a.ngramSize) forbidRepeats(seen, length, a.ngramSize, z);
    }
    if (a.forbidden.defined()) {
      const int32_t* ids = a.forbidden.data<int32_t>();
      for (int64_t i = 0; i < a.forbidden.dim(0); ++i) z[ids[i]] = kForbidden;
    }
  });
  checkSomeLogit("constrainLogits", out, B, V);
}

void warpLogits(Context& context, const WarpLogits& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1), threads = context.pool.size();
  const float* logits = a.logits.data<float>();
  float* out = a.out.data<float>();
  checkSomeLogit("warpLogits", logits, B, V);
  const float temperature = std::max(a.temperature, kLeastTemperature);
  const int64_t K = a.topK == 0 ? V : std::min(std::max(a.topK, a.keep), V);
  const bool cuts = a.topP < 1 || a.typicalP < 1;
  float* sortedOfThread = K < V ? context.scratch.take<float>(threads * V) : nullptr;
  Candidate* candidatesOfThread = cuts ? context.scratch.take<Candidate>(threads * V) : nullptr;
  context.pool.parallelFor(B, [&](int64_t row, int thread) {
    const float* x = logits + row * V;
    float* z = out + row * V;
    for (int64_t i = 0; i < V; ++i) z[i] = x[i] / temperature;
    if (K < V) {
      float* sorted = sortedOfThread + thread * V;
      std::copy(z, z + V, sorted);
      std::nth_element(sorted, sorted + (K - 1), sorted + V, [](float p, float q) { return p > q; });
      const float least = sorted[K - 1];
      for (int64_t i = 0; i < V; ++i) z[i] = z[i] < least ? kForbidden : z[i];
    }
    if (!cuts) return;
    Candidate* candidates = candidatesOfThread + thread * V;
    const float largest = largestLogit(z, V);
    int64_t n = 0;
    for (int64_t i = 0; i < V; ++i) {
      if (z[i] != kForbidden) candidates[n++] = {z[i], fastExp(z[i] - largest), 0.0f, static_cast<int32_t>(i)};
    }
    if (a.topP < 1) n = keepTopP(candidates, n, static_cast<double>(a.topP), a.keep);
    if (a.typicalP < 1) n = keepTypical(candidates, n, largest, static_cast<double>(a.typicalP), a.keep);
    std::fill(z, z + V, kForbidden);
    for (int64_t i = 0; i < n; ++i) z[candidates[i].id] = candidates[i].z;
  });
}

}  // namespace qlora::QLORA_ISA
