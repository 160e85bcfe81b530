// A block a row of logits; cuda/logits_rows.h says how cuts are found and how errors of values are told.
#include "core/random.h"
#include "cuda/logits_rows.h"
#include "ops/logits_choose.h"
#include "simd/lanes.h"

namespace qlora::cuda {

namespace {

QLORA_DEVICE uint64_t bitsOf(uint64_t seed, uint64_t stream, uint64_t index) {
  const auto words = philox(seed, stream, index);
  return (static_cast<uint64_t>(words[0]) << 32) | words[1];
}

__global__ void __launch_bounds__(1024) argmaxKernel(int64_t V, const float* logits, int32_t* ids, int32_t* errors) {
  const float* z = logits + blockIdx.x * V;
  const RowState row = lookAtRow(z, V);
  int32_t first = INT32_MAX;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    if (z[i] == row.largest) first = min(first, static_cast<int32_t>(i));
  }
  first = blockReduce(first, INT32_MAX, Smallest{});
  if (threadIdx.x != 0) return;
  ids[blockIdx.x] = row.error ? 0 : first;
  errors[blockIdx.x] = row.error;
}

/// Each thread sums a stretch of the row; the first one walks over the sums, and then over the stretch in which what is
/// wanted lies. So the walk is the CPU's, in order of the ids.
__global__ void __launch_bounds__(kThreads)
    sampleKernel(int64_t V, const float* logits, uint64_t seed, uint64_t stream, int32_t* ids, int32_t* errors) {
  QLORA_SHARED_ARRAY(double, sums, kThreads);
  const float* z = logits + blockIdx.x * V;
  const RowState row = lookAtRow(z, V);
  const int64_t stretch = (V + blockDim.x - 1) / blockDim.x;
  const auto weight = [&](int64_t i) { return static_cast<double>(fastExp(z[i] - row.largest)); };
  double own = 0;
  int32_t last = 0;  // that could be drawn
  for (int64_t i = threadIdx.x * stretch; i < min(V, (threadIdx.x + 1) * stretch); ++i) {
    const double w = weight(i);
    own += w;
    if (w != 0) last = static_cast<int32_t>(i);
  }
  sums[threadIdx.x] = own;
  last = blockReduce(last, 0, Largest{});
  if (threadIdx.x != 0) return;
  errors[blockIdx.x] = row.error;
  double total = 0, before = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) total += sums[t];
  const double wanted = static_cast<double>(bitsOf(seed, stream, blockIdx.x) >> 11) * 0x1p-53 * total;
  int64_t t = 0;
  while (t < blockDim.x && before + sums[t] <= wanted) before += sums[t++];
  int32_t chosen = last;
  for (int64_t i = t * stretch; i < min(V, (t + 1) * stretch); ++i) {
    const double w = weight(i);
    before += w;
    if (w != 0 && before > wanted) {
      chosen = static_cast<int32_t>(i);
      break;
    }
  }
  ids[blockIdx.x] = chosen;
}

struct Continuation {
  float key, score;
  int32_t place;
};

struct Beams {
  const float *logProbs, *running;
  float noise;
  uint64_t seed, stream;
};

/// Of a block's beam the K best by their keys, in order of their places; counts says how many there are.
__global__ void __launch_bounds__(1024) bestOfBeamKernel(int64_t V, int64_t K, Beams a, float* keysOfBeams,
                                                         Continuation* bestOfBeams, int32_t* counts, int32_t* errors) {
  const int64_t first = blockIdx.x * V;
  const float* logProbs = a.logProbs + first;
  float* keys = keysOfBeams + first;
  Continuation* best = bestOfBeams + blockIdx.x * K;
  const RowState row = lookAtRow(logProbs, V);
  if (threadIdx.x == 0) errors[blockIdx.x] = row.error == kNotFinite ? kNotFinite : kNoError;
  const float running = a.running[blockIdx.x];
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    float key = logProbs[i] + running;
    if (a.noise > 0 && key != kForbidden) {
      const uint64_t bits = bitsOf(a.seed, a.stream, static_cast<uint64_t>(first + i));
      const double u = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
      key += a.noise * static_cast<float>(-log(-log(u)));
    }
    keys[i] = key;
  }
  syncBlock();
  const auto byKey = [&](int64_t i) { return Element{fallingKey(keys[i]), 0.0f, logProbs[i] + running != kForbidden}; };
  const uint32_t last = largestKey([&](uint32_t k) { return countBelow(V, k, byKey) < K; });
  const int64_t quota = K - countBelow(V, last, byKey);
  int count = 0;
  applyCut(
      V, {last, quota}, byKey,
      [&](int64_t i, int64_t place) {
        best[place] = {keys[i], logProbs[i] + running, static_cast<int32_t>(first + i)};
        ++count;
      },
      [](int64_t) {});
  count = blockReduce(count, 0, Sum{});
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

/// A thread a candidate: it goes to the place that the number of better ones gives it.
__global__ void rankKernel(int64_t B, int64_t K, const Continuation* candidates, const int32_t* counts, int32_t* places,
                           float* scores) {
  int64_t total = 0;
  for (int64_t b = 0; b < B; ++b) total += counts[b];
  for (int64_t n = threadIndex(); n < B * K; n += threadCount()) {
    if (n >= total && n < K) {
      places[n] = 0;
      scores[n] = kForbidden;
    }
    if (n % K >= counts[n / K]) continue;
    const Continuation own = candidates[n];
    int64_t better = 0;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < counts[b]; ++i) {
        const Continuation& other = candidates[b * K + i];
        better += other.key > own.key || (other.key == own.key && other.place < own.place);
      }
    }
    if (better >= K) continue;
    places[better] = own.place;
    scores[better] = own.score;
  }
}

}  // namespace

void argmax(Context& context, const Argmax& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  int32_t* errors = context.scratch.take<int32_t>(B);
  launch(context, argmaxKernel, B, rowThreads(V), 0, V, a.logits.data<float>(), a.ids.data<int32_t>(), errors);
  throwErrors(context, "argmax", errors, B);
}

void sample(Context& context, const Sample& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  int32_t* errors = context.scratch.take<int32_t>(B);
  launch(context, sampleKernel, B, std::min(rowThreads(V), kThreads), 0, V, a.logits.data<float>(), a.seed, a.stream,
         a.ids.data<int32_t>(), errors);
  throwErrors(context, "sample", errors, B);
}

void beamCandidates(Context& context, const BeamCandidates& a) {
  const int64_t B = a.logProbs.dim(0), V = a.logProbs.dim(1), K = a.places.dim(0);
  int32_t* errors = context.scratch.take<int32_t>(B);
  float* keys = context.scratch.take<float>(B * V);
  Continuation* best = context.scratch.take<Continuation>(B * K);
  int32_t* counts = context.scratch.take<int32_t>(B);
  const Beams beams{a.logProbs.data<float>(), a.running.data<float>(), a.noise, a.seed, a.stream};
  launch(context, bestOfBeamKernel, B, rowThreads(V), 0, V, K, beams, keys, best, counts, errors);
  launch(context, rankKernel, blocksFor(B * K), kThreads, 0, B, K, best, counts, a.places.data<int32_t>(),
         a.scores.data<float>());
  throwErrors(context, "beamCandidates", errors, B);
}

}  // namespace qlora::cuda
