// A block a row of logits; cuda/logits_rows.h says how cuts are found and how errors of values are told.
#include "cuda/logits_rows.h"
#include "ops/logits_process.h"
#include "simd/lanes.h"

namespace qlora::cuda {

namespace {

// Below it nothing but the largest logit has a chance, and a division by less might overflow.
constexpr float kLeastTemperature = 1e-30f;

__global__ void __launch_bounds__(1024) logSoftmaxKernel(int64_t V, const float* logits, float* out, int32_t* errors) {
  const float* x = logits + blockIdx.x * V;
  float* y = out + blockIdx.x * V;
  const RowState row = lookAtRow(x, V);
  if (threadIdx.x == 0) errors[blockIdx.x] = row.error;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) sum += fastExp(x[i] - row.largest);
  const float logSum = logf(blockSum(sum));
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) y[i] = (x[i] - row.largest) - logSum;
}

/// Ids that constrainLogits was given. The place of a row's first that is outside the vocabulary, or -1.
struct WrongIds {
  int32_t seen, forbidden;
};

struct Constraints {
  const int32_t* seen;       // [B, seenStride]; null without
  const int32_t* forbidden;  // null without
  int64_t seenStride, seenLength, forbiddenCount, ngramSize;
  float penalty;
};

/// The place of the first of n ids outside [0, V), or -1.
QLORA_DEVICE int32_t firstWrong(const int32_t* ids, int64_t n, int64_t V) {
  int32_t first = INT32_MAX;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (ids[i] < 0 || ids[i] >= V) first = min(first, static_cast<int32_t>(i));
  }
  first = blockReduce(first, INT32_MAX, Smallest{});
  return first == INT32_MAX ? -1 : first;
}

__global__ void __launch_bounds__(1024)
    constrainKernel(int64_t V, const float* logits, Constraints a, float* out, int32_t* errors, WrongIds* wrongIds) {
  const float* x = logits + blockIdx.x * V;
  float* z = out + blockIdx.x * V;
  int32_t error = lookAtRow(x, V).error == kNotFinite ? kNotFinite : kNoError;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) z[i] = x[i];

  const int32_t* seen = a.seen ? a.seen + blockIdx.x * a.seenStride : nullptr;
  int32_t begin = static_cast<int32_t>(a.seenLength);
  for (int64_t i = threadIdx.x; i < a.seenLength; i += blockDim.x) {
    if (seen[i] != -1) begin = min(begin, static_cast<int32_t>(i));
  }
  begin = blockReduce(begin, INT32_MAX, Smallest{});
  const int64_t length = a.seenLength - begin;
  seen += begin;
  const WrongIds wrong{firstWrong(seen, length, V), firstWrong(a.forbidden, a.forbiddenCount, V)};
  if (threadIdx.x == 0) wrongIds[blockIdx.x] = wrong;
  syncBlock();
  if (wrong.seen < 0 && wrong.forbidden < 0) {
    // From x, so that a token that was seen twice is penalized once.
    for (int64_t i = threadIdx.x; i < length && a.penalty != 1; i += blockDim.x) {
      const float score = x[seen[i]];
      z[seen[i]] = score < 0 ? score * a.penalty : score / a.penalty;
    }
    syncBlock();
    if (a.ngramSize > 0 && length >= a.ngramSize) {
      const int64_t prefix = length - (a.ngramSize - 1);
      for (int64_t i = threadIdx.x; i + a.ngramSize <= length; i += blockDim.x) {
        int64_t same = 0;
        while (same < a.ngramSize - 1 && seen[i + same] == seen[prefix + same]) ++same;
        if (same == a.ngramSize - 1) z[seen[i + same]] = kForbidden;
      }
    }
    for (int64_t i = threadIdx.x; i < a.forbiddenCount; i += blockDim.x) z[a.forbidden[i]] = kForbidden;
    syncBlock();
    if (!error) error = lookAtRow(z, V).error;
  }
  if (threadIdx.x == 0) errors[blockIdx.x] = error;
}

struct Warps {
  float temperature;
  int64_t topK;  // V for all
  double topP, typicalP;
  int64_t keep;
};

/// e^(z - largest) of the tokens that are left, as fp32 in `weights`.
QLORA_DEVICE void weigh(int64_t V, const float* z, float largest, float* weights) {
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) weights[i] = fastExp(z[i] - largest);
}

/// Where an order is cut once weights reach `wanted` and there are `keep`: the element that reaches it is the last, and
/// what is equal to it stays if `equalsStay` is kAllOfThem, else as many as reach it.
template <class At>
QLORA_DEVICE Cut cutAt(int64_t V, double wanted, int64_t keep, int64_t equalsStay, At&& at) {
  Cut cut{largestKey([&](uint32_t key) { return weightBelow(V, key, at) < wanted; }), equalsStay};
  if (equalsStay != kAllOfThem) {
    // Those with this key weigh the same; a stretch of them stays, each while what lies before it is less than wanted.
    float weight = 0;
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
      const Element e = at(i);
      if (e.alive && e.key == cut.key) weight = e.weight;
    }
    const double below = weightBelow(V, cut.key, at), each = static_cast<double>(blockMax(weight));
    double n = each > 0 ? ceil((wanted - below) / each) : 0.0;
    if (n > 0 && below + (n - 1) * each >= wanted) n -= 1;
    if (each > 0 && below + n * each < wanted) n += 1;
    cut.quota = static_cast<int64_t>(fmin(n, 1e18));
  }
  if (keep > 1) {
    const uint32_t key = largestKey([&](uint32_t k) { return countBelow(V, k, at) < keep; });
    const int64_t quota = keep - countBelow(V, key, at);
    if (key > cut.key) {
      cut = {key, quota};
    } else if (key == cut.key && quota > cut.quota) {
      cut.quota = quota;
    }
  }
  return cut;
}

template <class At>
QLORA_DEVICE void forbidBeyond(int64_t V, const Cut& cut, float* z, At&& at) {
  applyCut(
      V, cut, at, [](int64_t, int64_t) {}, [&](int64_t i) { z[i] = kForbidden; });
  syncBlock();
}

__global__ void __launch_bounds__(1024) warpKernel(int64_t V, const float* logits, Warps a, float* out,
                                                   float* weightsOfRows, float* distancesOfRows, int32_t* errors) {
  const float* x = logits + blockIdx.x * V;
  float* z = out + blockIdx.x * V;
  const RowState row = lookAtRow(x, V);
  if (threadIdx.x == 0) errors[blockIdx.x] = row.error;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) z[i] = x[i] / a.temperature;
  syncBlock();
  const auto byValue = [&](int64_t i) { return Element{fallingKey(z[i]), 0.0f, z[i] != kForbidden}; };
  if (a.topK < V) {
    const uint32_t key = largestKey([&](uint32_t k) { return countBelow(V, k, byValue) < a.topK; });
    forbidBeyond(V, {key, kAllOfThem}, z, byValue);
  }
  const float largest = row.largest / a.temperature;
  float* weights = weightsOfRows + blockIdx.x * V;
  float* distances = distancesOfRows + blockIdx.x * V;
  if (a.topP < 1) {
    weigh(V, z, largest, weights);
    syncBlock();
    const auto byWeight = [&](int64_t i) { return Element{fallingKey(z[i]), weights[i], z[i] != kForbidden}; };
    const double total = weightBelow(V, UINT32_MAX, byWeight);
    forbidBeyond(V, cutAt(V, a.topP * total, a.keep, 0, byWeight), z, byWeight);
  }
  if (a.typicalP < 1) {
    weigh(V, z, largest, weights);
    double total = 0, entropy = 0;
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) total += static_cast<double>(weights[i]);
    total = blockReduce(total, 0.0, Sum{});
    const double logTotal = log(total);
    const auto logP = [&](int64_t i) { return static_cast<double>(z[i] - largest) - logTotal; };
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
      if (z[i] != kForbidden) entropy -= static_cast<double>(weights[i]) / total * logP(i);
    }
    entropy = blockReduce(entropy, 0.0, Sum{});
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) distances[i] = static_cast<float>(fabs(-logP(i) - entropy));
    syncBlock();
    const auto byDistance = [&](int64_t i) { return Element{risingKey(distances[i]), weights[i], z[i] != kForbidden}; };
    forbidBeyond(V, cutAt(V, a.typicalP * total, a.keep, kAllOfThem, byDistance), z, byDistance);
  }
}

[[noreturn]] void failWrongId(Context& context, const char* what, const int32_t* ids, int32_t place, int64_t V) {
  int32_t id;
  context.queue->read(&id, ids + place, sizeof id);
  fail("ERR_QLORA_TOKEN_ID", "constrainLogits: %s[%d] must be from 0 to %lld, got %d", what, place,
       static_cast<long long>(V - 1), id);
}

/// Throws for ids outside the vocabulary. Waits.
void throwWrongIds(Context& context, const ConstrainLogits& a, const WrongIds* wrongIds, int64_t B, int64_t V) {
  std::vector<WrongIds> found(static_cast<size_t>(B));
  context.queue->read(found.data(), wrongIds, found.size() * sizeof(WrongIds));
  for (const WrongIds& wrong : found) {
    if (wrong.forbidden >= 0) failWrongId(context, "forbidden", a.forbidden.data<int32_t>(), wrong.forbidden, V);
  }
  for (int64_t row = 0; row < B; ++row) {
    const int32_t place = found[static_cast<size_t>(row)].seen;
    if (place < 0) continue;
    // Places are counted from where a shorter row begins.
    std::vector<int32_t> seen(static_cast<size_t>(a.seenLength));
    const int32_t* ids = a.seen.data<int32_t>() + row * a.seen.dim(1);
    context.queue->read(seen.data(), ids, seen.size() * sizeof(int32_t));
    const auto begin = std::find_if(seen.begin(), seen.end(), [](int32_t id) { return id != -1; }) - seen.begin();
    fail("ERR_QLORA_TOKEN_ID", "constrainLogits: seen[%d] must be from 0 to %lld, got %d", place,
         static_cast<long long>(V - 1), seen[static_cast<size_t>(begin + place)]);
  }
}

}  // namespace

void logSoftmax(Context& context, const LogSoftmax& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  int32_t* errors = context.scratch.take<int32_t>(B);
  launch(context, logSoftmaxKernel, B, rowThreads(V), 0, V, a.logits.data<float>(), a.out.data<float>(), errors);
  throwErrors(context, "logSoftmax", errors, B);
}

void constrainLogits(Context& context, const ConstrainLogits& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  int32_t* errors = context.scratch.take<int32_t>(B);
  WrongIds* wrongIds = context.scratch.take<WrongIds>(B);
  const bool sees = a.seen.defined(), forbids = a.forbidden.defined();
  const Constraints constraints{
      a.seen.dataOrNull<int32_t>(), a.forbidden.dataOrNull<int32_t>(), sees ? a.seen.dim(1) : 0,
      sees ? a.seenLength : 0,      forbids ? a.forbidden.dim(0) : 0,  sees ? a.ngramSize : 0,
      a.repetitionPenalty};
  launch(context, constrainKernel, B, rowThreads(V), 0, V, a.logits.data<float>(), constraints, a.out.data<float>(),
         errors, wrongIds);
  // A row that is not finite comes first, as on the CPU; one of which nothing is left after the ids.
  const std::vector<int32_t> found = readErrors(context, errors, B);
  throwError("constrainLogits", found, kNotFinite);
  if (context.queue && (sees || forbids)) throwWrongIds(context, a, wrongIds, B, V);
  throwError("constrainLogits", found, kNoTokenLeft);
}

void warpLogits(Context& context, const WarpLogits& a) {
  const int64_t B = a.logits.dim(0), V = a.logits.dim(1);
  const int64_t K = a.topK == 0 ? V : std::min(std::max(a.topK, a.keep), V);
  const bool cuts = a.topP < 1 || a.typicalP < 1;
  int32_t* errors = context.scratch.take<int32_t>(B);
  float* weights = context.scratch.take<float>(cuts ? B * V : 0);
  float* distances = context.scratch.take<float>(a.typicalP < 1 ? B * V : 0);
  const Warps warps{std::max(a.temperature, kLeastTemperature), K, static_cast<double>(a.topP),
                    static_cast<double>(a.typicalP), a.keep};
  launch(context, warpKernel, B, rowThreads(V), 0, V, a.logits.data<float>(), warps, a.out.data<float>(), weights,
         distances, errors);
  throwErrors(context, "warpLogits", errors, B);
}

}  // namespace qlora::cuda
