#include "ops/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/page_file.h"
#include "simd/dynamic_state.h"
#include "simd/tensor_list.h"

namespace qlora::QLORA_ISA {

namespace {

/// What unscales and clips every gradient. 1 leaves its bits as they are.
float gradientFactor(const OptimizerStep& a) {
  const double scale = static_cast<double>(*a.lossScale.data<float>());
  const double norm = static_cast<double>(a.norm.data<float>()[0]) / scale;
  const double clip = a.maxNorm == 0 ? 1.0 : std::min(1.0, a.maxNorm / (norm + 1e-6));
  return static_cast<float>(clip / scale);
}

double stepNumber(const OptimizerStep& a) { return static_cast<double>(a.counters.data<int32_t>()[0]) + 1; }

/// A piece of a parameter, and where each array of its state begins.
struct Place {
  Piece piece;
  char* memory[kMostPagedArrays];
};

template <class Rule, size_t... I>
QLORA_INLINE void applyRule(const Rule& rule, float* p, const float* g, float factor, int64_t n, float* const* states,
                            std::index_sequence<I...>) {
  rule(p, g, factor, n, states[I]...);
}

template <class... States, class Rule>
void updatePlace(const OptimizerStep& a, const Place& place, const Rule& rule, float factor) {
  float* p = a.params[place.piece.tensor].data<float>() + place.piece.begin;
  const float* g = a.grads[place.piece.tensor].data<float>() + place.piece.begin;
  constexpr size_t kStates = sizeof...(States);
  for (int64_t at = 0; at < place.piece.count; at += kDynamicBlock) {
    const int64_t n = std::min(kDynamicBlock, place.piece.count - at);
    [[maybe_unused]] float buffers[kStates + 1][kDynamicBlock];
    float* states[kStates + 1];
    size_t i = 0, array = 0;
    ((states[i] = States::load(place.memory + array, at, n, buffers[i]), ++i, array += States::kArrays), ...);
    applyRule(rule, p + at, g + at, factor, n, states, std::index_sequence_for<States...>{});
    i = array = 0;
    ((States::store(place.memory + array, at, n, states[i]), ++i, array += States::kArrays), ...);
  }
}

template <class... States, class Rule>
void updateInMemory(Context& context, const OptimizerStep& a, const PagedArray* arrays, int arrayCount,
                    const Rule& rule, float factor) {
  const Pieces pieces = cutIntoPieces(context, a.params);
  context.pool.parallelFor(pieces.count, [&](int64_t i, int) {
    Place place{pieces.data[i], {}};
    for (int k = 0; k < arrayCount; ++k) {
      place.memory[k] = (*arrays[k].list)[place.piece.tensor].template data<char>() +
                        place.piece.begin / arrays[k].elements * arrays[k].itemBytes;
    }
    updatePlace<States...>(a, place, rule, factor);
  });
}

/// The same for what streamPages has in a slot.
template <class... States, class Rule>
void updateRuns(Context& context, const OptimizerStep& a, const PagedArray* arrays, int arrayCount, const Rule& rule,
                float factor, char* slot, const PagedRun* runs, int64_t count) {
  int64_t total = 0;
  for (int64_t r = 0; r < count; ++r) total += (runs[r].count + kPiece - 1) / kPiece;
  Scratch scratch = context.scratch.nested();
  Place* places = scratch.take<Place>(total);
  Place* next = places;
  for (const PagedRun* run = runs; run < runs + count; ++run) {
    for (int64_t begin = 0; begin < run->count; begin += kPiece, ++next) {
      *next = {{run->tensor, run->begin + begin, std::min(kPiece, run->count - begin)}, {}};
      for (int k = 0; k < arrayCount; ++k) {
        next->memory[k] = slot + run->at[k] + begin / arrays[k].elements * arrays[k].itemBytes;
      }
    }
  }
  context.pool.parallelFor(total, [&](int64_t i, int) { updatePlace<States...>(a, places[i], rule, factor); });
}

/// What every optimizer shares: skipping, unscaling and clipping, pieces, paging. The rule does its arithmetic to at
/// most 256 elements: rule(p, g, factor, n, state...). `lists` has those of each state in turn.
template <class... States, class Rule>
void runStep(Context& context, const OptimizerStep& a, const Rule& rule,
             const std::vector<Tensor>* const* lists = nullptr) {
  const bool finite = a.norm.data<float>()[1] != 0;
  *a.applied.data<float>() = finite ? 1.0f : 0.0f;
  if (!finite || a.params.empty()) return;
  const float factor = gradientFactor(a);
  constexpr int kArrays = (0 + ... + States::kArrays);
  PagedArray arrays[kArrays + 1];
  constexpr int kept[] = {States::kArrays..., 0};
  for (int i = 0, state = 0; i < kArrays; ++state) {
    const bool bytes = kept[state] == 2;
    arrays[i] = {lists[i], 1, bytes ? 1 : 4};
    if (bytes) arrays[i + 1] = {lists[i + 1], kDynamicBlock, 4};
    i += kept[state];
  }
  PageFile* pages = kArrays ? (*lists[0])[0].storage->pages.get() : nullptr;
  if (!pages) return updateInMemory<States...>(context, a, arrays, kArrays, rule, factor);
  auto update = [&](char* slot, const PagedRun* runs, int64_t count) {
    updateRuns<States...>(context, a, arrays, kArrays, rule, factor, slot, runs, count);
  };
  streamPages(
      *pages, a.params, arrays, kArrays, kPiece,
      [](void* body, char* slot, const PagedRun* runs, int64_t count) {
        (*static_cast<decltype(update)*>(body))(slot, runs, count);
      },
      &update);
}

float decayOf(const OptimizerStep& a) { return static_cast<float>(1 - a.lr * a.weightDecay); }

struct AdamWRule {
  float beta1, rest1, beta2, rest2, decay, rate, eps;

  AdamWRule(const OptimizerStep& a, const AdamOptions& o) {
    const double t = stepNumber(a);
    const double c1 = 1 - std::pow(o.beta1, t), c2 = std::sqrt(1 - std::pow(o.beta2, t));
    beta1 = static_cast<float>(o.beta1);
    rest1 = static_cast<float>(1 - o.beta1);
    beta2 = static_cast<float>(o.beta2);
    rest2 = static_cast<float>(1 - o.beta2);
    decay = decayOf(a);
    rate = static_cast<float>(a.lr * c2 / c1);
    eps = static_cast<float>(o.eps * c2);
  }
  QLORA_INLINE void operator()(float* __restrict p, const float* __restrict g, float factor, int64_t n,
                               float* __restrict m, float* __restrict v) const {
    for (int64_t i = 0; i < n; ++i) {
      const float d = g[i] * factor;
      m[i] = beta1 * m[i] + rest1 * d;
      v[i] = beta2 * v[i] + rest2 * (d * d);
      p[i] = p[i] * decay - rate * (m[i] / (std::sqrt(v[i]) + eps));
    }
  }
};

struct LionRule {
  float beta1, rest1, beta2, rest2, decay, rate;

  LionRule(const OptimizerStep& a, double b1, double b2)
      : beta1(static_cast<float>(b1)),
        rest1(static_cast<float>(1 - b1)),
        beta2(static_cast<float>(b2)),
        rest2(static_cast<float>(1 - b2)),
        decay(decayOf(a)),
        rate(static_cast<float>(a.lr)) {}
  QLORA_INLINE void operator()(float* __restrict p, const float* __restrict g, float factor, int64_t n,
                               float* __restrict m) const {
    for (int64_t i = 0; i < n; ++i) {
      const float d = g[i] * factor;
      const float direction = beta1 * m[i] + rest1 * d;
      const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
      p[i] = p[i] * decay - rate * sign;
      m[i] = beta2 * m[i] + rest2 * d;
    }
  }
};

struct AdEMAMixRule {
  float beta1, rest1, beta2, rest2, beta3, rest3, decay, rate, c1, c2, alpha, eps;

  explicit AdEMAMixRule(const AdEMAMix& a) {
    const AdamOptions& o = a.options;
    const double t = stepNumber(a.step), done = a.horizon > 0 ? t / a.horizon : 1.0;
    double b3 = a.beta3;
    if (a.horizon > 0) {
      b3 = std::min(std::exp(1 / ((1 - done) / std::log(o.beta1) + done / std::log(a.beta3))), a.beta3);
    }
    beta1 = static_cast<float>(o.beta1);
    rest1 = static_cast<float>(1 - o.beta1);
    beta2 = static_cast<float>(o.beta2);
    rest2 = static_cast<float>(1 - o.beta2);
    beta3 = static_cast<float>(b3);
    rest3 = static_cast<float>(1 - b3);
    decay = decayOf(a.step);
    rate = static_cast<float>(a.step.lr);
    c1 = static_cast<float>(1 - std::pow(o.beta1, t));
    c2 = static_cast<float>(std::sqrt(1 - std::pow(o.beta2, t)));
    alpha = static_cast<float>(std::min(done * a.alpha, a.alpha));
    eps = static_cast<float>(o.eps);
  }
  QLORA_INLINE void operator()(float* __restrict p, const float* __restrict g, float factor, int64_t n,
                               float* __restrict m, float* __restrict m2, float* __restrict v) const {
    for (int64_t i = 0; i < n; ++i) {
      const float d = g[i] * factor;
      m[i] = beta1 * m[i] + rest1 * d;
      m2[i] = beta3 * m2[i] + rest3 * d;
      v[i] = beta2 * v[i] + rest2 * (d * d);
      p[i] = p[i] * decay - rate * ((m[i] / c1 + alpha * m2[i]) / (std::sqrt(v[i]) / c2 + eps));
    }
  }
};

struct SgdRule {
  float rate, momentum, decay;

  /// At the first step m is the gradient, whatever it held.
  explicit SgdRule(const Sgd& a)
      : rate(static_cast<float>(a.step.lr)),
        momentum(static_cast<float>(stepNumber(a.step) == 1 ? 0.0 : a.momentum)),
        decay(static_cast<float>(a.step.weightDecay)) {}
  QLORA_INLINE void operator()(float* __restrict p, const float* __restrict g, float factor, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = p[i] - rate * decayed(p[i], g[i] * factor);
  }
  QLORA_INLINE void operator()(float* __restrict p, const float* __restrict g, float factor, int64_t n,
                               float* __restrict m) const {
    for (int64_t i = 0; i < n; ++i) {
      const float d = decayed(p[i], g[i] * factor);
      m[i] = momentum == 0.0f ? d : momentum * m[i] + d;
      p[i] = p[i] - rate * m[i];
    }
  }

 private:
  QLORA_INLINE float decayed(float p, float g) const { return decay == 0.0f ? g : g + decay * p; }
};

}  // namespace

void adamw(Context& context, const AdamW& a) {
  const std::vector<Tensor>* const lists[] = {&a.m, &a.v};
  runStep<FullState, FullState>(context, a.step, AdamWRule(a.step, a.options), lists);
}

void adamw8bit(Context& context, const AdamW8bit& a) {
  const std::vector<Tensor>* const lists[] = {&a.mIndex, &a.mAbsmax, &a.vIndex, &a.vAbsmax};
  runStep<SignedBytes, UnsignedBytes>(context, a.step, AdamWRule(a.step, a.options), lists);
}

void lion(Context& context, const Lion& a) {
  const std::vector<Tensor>* const lists[] = {&a.m};
  runStep<FullState>(context, a.step, LionRule(a.step, a.beta1, a.beta2), lists);
}

void lion8bit(Context& context, const Lion8bit& a) {
  const std::vector<Tensor>* const lists[] = {&a.mIndex, &a.mAbsmax};
  runStep<SignedBytes>(context, a.step, LionRule(a.step, a.beta1, a.beta2), lists);
}

void ademamix(Context& context, const AdEMAMix& a) {
  const std::vector<Tensor>* const lists[] = {&a.m, &a.m2, &a.v};
  runStep<FullState, FullState, FullState>(context, a.step, AdEMAMixRule(a), lists);
}

void sgd(Context& context, const Sgd& a) {
  const std::vector<Tensor>* const lists[] = {&a.m};
  if (a.momentum == 0) {
    runStep<>(context, a.step, SgdRule(a));
  } else {
    runStep<FullState>(context, a.step, SgdRule(a), lists);
  }
}

void finishStep(Context&, const FinishStep& a) {
  const float* norm = a.norm.data<float>();
  int32_t* counters = a.counters.data<int32_t>();
  float& scale = *a.lossScale.data<float>();
  const bool finite = norm[1] != 0;
  float* result = a.result.data<float>();
  result[0] = norm[0] / scale;
  result[1] = finite ? 1.0f : 0.0f;
  result[2] = scale;
  counters[0] += finite ? 1 : 0;
  counters[1] = finite ? counters[1] + 1 : 0;
  if (a.growthInterval == 0) return;
  if (!finite) {
    scale = std::max(1.0f, scale / 2);
  } else if (counters[1] == a.growthInterval) {
    scale *= 2;
    counters[1] = 0;
  }
}

}  // namespace qlora::QLORA_ISA
