#include "ops/logits_process.h"

#include <algorithm>
#include <cmath>

#include "ops/logits_blocks.h"

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

/// The K-th largest of a row. `room` has room for V.
float kthLargest(const float* z, int64_t V, int64_t K, float* room) {
  const auto nth = [&](int64_t n) {
    std::nth_element(room, room + (K - 1), room + n, [](float p, float q) { return p > q; });
    return room[K - 1];
  };
  // The K-th largest of the blocks' largest has K at least as large: only those can be the first K.
  int64_t blocks = 0;
  forBlocksFrom(kForbidden, z, V, [&](int64_t, int64_t, float largest) { room[blocks++] = largest; });
  const float least = K <= blocks ? nth(blocks) : kForbidden;
  int64_t count = 0;
  forBlocksFrom(least, z, V, [&](int64_t begin, int64_t n, float) {
    for (int64_t i = begin; i < begin + n; ++i) {
      if (z[i] >= least) room[count++] = z[i];
    }
  });
  return nth(count);
}

/// What a row has left.
struct Left {
  double weight;
  int64_t count;
};

Left leftOf(const float* z, int64_t V, float largest) {
  Left left{};
  forBlocksFrom(kLeastLeft, z, V, [&](int64_t begin, int64_t n, float) {
    left.weight += BlockWeights(z + begin, n, largest).sum(n);
    for (int64_t i = begin; i < begin + n; ++i) left.count += z[i] != kForbidden;
  });
  return left;
}

/// Of what is left all that weigh at least leastWeight; returns how many.
int64_t collect(const float* z, int64_t V, float largest, float leastWeight, Candidate* candidates) {
  int64_t count = 0;
  forBlocksFrom(kLeastLeft, z, V, [&](int64_t begin, int64_t n, float) {
    const BlockWeights weights(z + begin, n, largest);
    for (int64_t i = 0; i < n; ++i) {
      if (z[begin + i] == kForbidden || weights.of[i] < leastWeight) continue;
      candidates[count++] = {z[begin + i], weights.of[i], 0.0f, static_cast<int32_t>(begin + i)};
    }
  });
  return count;
}

/// Brings candidates into order, the first ones first and no more than are looked at: until isEnough(candidate), asked
/// of each in turn, holds. Returns the place of that one, or n.
template <class Before, class IsEnough>
int64_t sortUntil(Candidate* candidates, int64_t n, Before&& before, IsEnough&& isEnough) {
  int64_t i = 0;
  for (int64_t piece = 256; i < n; piece *= 4) {
    const int64_t end = std::min(n, i + piece);
    if (end < n) std::nth_element(candidates + i, candidates + end, candidates + n, before);
    std::sort(candidates + i, candidates + end, before);
    for (; i < end; ++i) {
      if (isEnough(candidates[i])) return i;
    }
  }
  return n;
}

/// Below it lies what top-p surely drops: together they weigh less than may be cut off. Where more than one has to
/// stay, they might be among those.
float leastWeightOfTopP(const Left& left, double topP, int64_t keep) {
  return keep > 1 ? 0.0f : static_cast<float>((1 - topP) * left.weight / static_cast<double>(left.count) * 0.999);
}

/// Moves what top-p keeps to the front, most likely first; returns how many.
int64_t keepTopP(Candidate* candidates, int64_t n, double wanted, int64_t keep) {
  double sum = 0;
  int64_t kept = 0;
  return sortUntil(
      candidates, n, [](const Candidate& a, const Candidate& b) { return a.z != b.z ? a.z > b.z : a.id < b.id; },
      [&](const Candidate& c) {
        const bool isEnough = kept >= keep && sum >= wanted;
        sum += static_cast<double>(c.weight);
        ++kept;
        return isEnough;
      });
}

/// Moves what typical-p keeps to the front, most typical first; returns how many.
int64_t keepTypical(Candidate* candidates, int64_t n, float largest, double typicalP, int64_t keep) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(candidates[i].weight);
  const double logTotal = std::log(total);
  double entropy = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double logP = static_cast<double>(candidates[i].z - largest) - logTotal;
    entropy -= static_cast<double>(candidates[i].weight) / total * logP;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double logP = static_cast<double>(candidates[i].z - largest) - logTotal;
    candidates[i].distance = static_cast<float>(std::fabs(-logP - entropy));
  }
  const double wanted = typicalP * total;
  double sum = 0;
  int64_t kept = 0;
  float last = 0;
  return sortUntil(
      candidates, n,
      [](const Candidate& a, const Candidate& b) {
        return a.distance != b.distance ? a.distance < b.distance : a.id < b.id;
      },
      [&](const Candidate& c) {
        // What is as far as the last that was needed stays too.
        if (kept >= keep && sum >= wanted && c.distance != last) return true;
        if (sum < wanted) last = c.distance;
        sum += static_cast<double>(c.weight);
        ++kept;
        return false;
      });
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
  const float* largest = checkedLargestLeft(context, "logSoftmax", logits, B, V);
  context.pool.parallelFor(B, [&](int64_t row, int) {
    const float *x = logits + row * V, most = largest[row];
    const float sum = laneSum(V, [&](int64_t i) { return fastExp(x[i] - most); });
    const float logSum = std::log(sum);
    for (int64_t i = 0; i < V; ++i) out[row * V + i] = (x[i] - most) - logSum;
  });
}

void constrainLogits(Context& context, const ConstrainLogits& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  const float* logits = a.logits.data<float>();
  float* out = a.out.data<float>();
  checkedLargest(context, "constrainLogits", logits, B, V);
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
  checkedLargestLeft(context, "constrainLogits", out, B, V);
}

void warpLogits(Context& context, const WarpLogits& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1), threads = context.pool.size();
  const float* logits = a.logits.data<float>();
  float* out = a.out.data<float>();
  checkedLargestLeft(context, "warpLogits", logits, B, V);
  const float temperature = std::max(a.temperature, kLeastTemperature);
  const int64_t K = a.topK == 0 ? V : std::min(std::max(a.topK, a.keep), V);
  const bool cuts = a.topP < 1 || a.typicalP < 1;
  float* roomOfThread = K < V ? context.scratch.take<float>(threads * V) : nullptr;
  Candidate* candidatesOfThread = cuts ? context.scratch.take<Candidate>(threads * V) : nullptr;
  context.pool.parallelFor(B, [&](int64_t row, int thread) {
    const float* x = logits + row * V;
    float* z = out + row * V;
    for (int64_t i = 0; i < V; ++i) z[i] = x[i] / temperature;
    if (K < V) {
      const float least = kthLargest(z, V, K, roomOfThread + thread * V);
      for (int64_t i = 0; i < V; ++i) z[i] = z[i] < least ? kForbidden : z[i];
    }
    if (!cuts) return;
    Candidate* candidates = candidatesOfThread + thread * V;
    const float largest = largestOf(z, V);
    int64_t n = 0;
    if (a.topP < 1) {
      const double topP = static_cast<double>(a.topP);
      const Left left = leftOf(z, V, largest);
      n = collect(z, V, largest, leastWeightOfTopP(left, topP, a.keep), candidates);
      n = keepTopP(candidates, n, topP * left.weight, a.keep);
    } else {
      n = collect(z, V, largest, 0, candidates);
    }
    if (a.typicalP < 1) n = keepTypical(candidates, n, largest, static_cast<double>(a.typicalP), a.keep);
    std::fill(z, z + V, kForbidden);
    for (int64_t i = 0; i < n; ++i) z[candidates[i].id] = candidates[i].z;
  });
}

}  // namespace qlora::QLORA_ISA
