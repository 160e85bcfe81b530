#include "ops/logits_choose.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "ops/logits_blocks.h"

namespace qlora::QLORA_ISA {

namespace {

uint64_t bitsOf(uint64_t seed, uint64_t stream, uint64_t index) {
  const auto words = philox(seed, stream, index);
  return (static_cast<uint64_t>(words[0]) << 32) | words[1];
}

/// The token at uniform01 of the way through the weights e^(z - largest). `sums` has room for one of each block.
int32_t draw(const float* z, int64_t V, float largest, double uniform01, double* sums) {
  std::fill_n(sums, (V + kLogitsBlock - 1) / kLogitsBlock, 0.0);
  double total = 0;
  forBlocksFrom(kLeastLeft, z, V, [&](int64_t begin, int64_t n, float) {
    total += sums[begin / kLogitsBlock] = BlockWeights(z + begin, n, largest).sum(n);
  });
  // Ends within the row: these sums add up to the total, and less is wanted.
  const double wanted = uniform01 * total;
  double before = 0;
  int64_t block = 0;
  while (before + sums[block] <= wanted) before += sums[block++];
  const int64_t begin = block * kLogitsBlock, n = std::min(kLogitsBlock, V - begin);
  const BlockWeights weights(z + begin, n, largest);
  // A block's sum was rounded otherwise: should the walk end before what is wanted, its last that weighs something.
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights.of[i] == 0) continue;
    last = i;
    before += static_cast<double>(weights.of[i]);
    if (before > wanted) break;
  }
  return static_cast<int32_t>(begin + last);
}

struct Continuation {
  float key, score;
  int32_t place;
};

/// Inserts into the `count` best of at most K, best first; among equals the earlier comes first.
void insert(Continuation* best, int64_t K, int64_t& count, Continuation c) {
  if (count == K && c.key <= best[K - 1].key) return;
  int64_t i = count < K ? count++ : K - 1;
  for (; i > 0 && best[i - 1].key < c.key; --i) best[i] = best[i - 1];
  best[i] = c;
}

}  // namespace

void argmax(Context& context, const Argmax& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  const float* logits = a.logits.data<float>();
  int32_t* ids = a.ids.data<int32_t>();
  const float* largest = checkedLargestLeft(context, "argmax", logits, B, V);
  context.pool.parallelFor(B, [&](int64_t row, int) {
    const float* z = logits + row * V;
    int64_t i = 0;
    while (largestOf(z + i, std::min(kLogitsBlock, V - i)) != largest[row]) i += kLogitsBlock;
    while (z[i] != largest[row]) ++i;
    ids[row] = static_cast<int32_t>(i);
  });
}

void sample(Context& context, const Sample& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1), blocks = (V + kLogitsBlock - 1) / kLogitsBlock;
  const float* logits = a.logits.data<float>();
  int32_t* ids = a.ids.data<int32_t>();
  const float* largest = checkedLargestLeft(context, "sample", logits, B, V);
  double* sumsOfThread = context.scratch.take<double>(context.pool.size() * blocks);
  context.pool.parallelFor(B, [&](int64_t row, int thread) {
    const uint64_t bits = bitsOf(a.seed, a.stream, static_cast<uint64_t>(row));
    ids[row] = draw(logits + row * V, V, largest[row], static_cast<double>(bits >> 11) * 0x1p-53,
                    sumsOfThread + thread * blocks);
  });
}

void beamCandidates(Context& context, const BeamCandidates& a) {
  const int64_t B = a.logProbs.dim(0), V = a.logProbs.dim(1), K = a.places.dim(0);
  const float* logProbs = a.logProbs.data<float>();
  const float* running = a.running.data<float>();
  checkedLargest(context, "beamCandidates", logProbs, B, V);
  Continuation* bestOfBeam = context.scratch.take<Continuation>(B * K);
  int64_t* counts = context.scratch.take<int64_t>(B);
  context.pool.parallelFor(B, [&](int64_t b, int) {
    Continuation* best = bestOfBeam + b * K;
    int64_t count = 0;
    const float* row = logProbs + b * V;
    for (int64_t begin = 0; begin < V; begin += kLogitsBlock) {
      const int64_t n = std::min(kLogitsBlock, V - begin);
      // Rounding keeps the order, so no sum is above that of the largest.
      if (a.noise == 0 && count == K && largestOf(row + begin, n) + running[b] <= best[K - 1].key) continue;
      for (int64_t v = begin; v < begin + n; ++v) {
        const int64_t place = b * V + v;
        const float score = row[v] + running[b];
        if (score == -__builtin_inff()) continue;
        float key = score;
        if (a.noise > 0) {
          const uint64_t bits = bitsOf(a.seed, a.stream, static_cast<uint64_t>(place));
          const double u = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
          key += a.noise * static_cast<float>(-std::log(-std::log(u)));
        }
        insert(best, K, count, {key, score, static_cast<int32_t>(place)});
      }
    }
    counts[b] = count;
  });
  Continuation* best = context.scratch.take<Continuation>(K);
  int64_t count = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < counts[b]; ++i) insert(best, K, count, bestOfBeam[b * K + i]);
  }
  int32_t* places = a.places.data<int32_t>();
  float* scores = a.scores.data<float>();
  for (int64_t i = 0; i < K; ++i) {
    places[i] = i < count ? best[i].place : 0;
    scores[i] = i < count ? best[i].score : -__builtin_inff();
  }
}

}  // namespace qlora::QLORA_ISA
