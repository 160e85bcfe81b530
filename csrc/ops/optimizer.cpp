#include "ops/optimizer.h"

#include <algorithm>
#include <utility>

#include "core/page_file.h"
#include "simd/dynamic_state.h"
#include "simd/tensor_list.h"

namespace qlora::QLORA_ISA {

namespace {

double stepNumber(const OptimizerStep& a) { return static_cast<double>(a.counters.data<int32_t>()[0]) + 1; }

/// A piece of a parameter, and where each array of its state begins.
struct Place {
  Piece piece;
  char* memory[kMostPagedArrays];
};

template <class Rule, class... State>
QLORA_INLINE void applyRule(const Rule& rule, float* __restrict p, const float* __restrict g, float factor, int64_t n,
                            State* __restrict... state) {
  for (int64_t i = 0; i < n; ++i) rule(p[i], g[i] * factor, state[i]...);
}

template <class Rule, size_t... I>
QLORA_INLINE void applyRule(const Rule& rule, float* p, const float* g, float factor, int64_t n, float* const* states,
                            std::index_sequence<I...>) {
  applyRule(rule, p, g, factor, n, states[I]...);
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
  const float factor = gradientFactor(a.norm.data<float>()[0], *a.lossScale.data<float>(), a.maxNorm);
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

}  // namespace

void adamw(Context& context, const AdamW& a) {
  const std::vector<Tensor>* const lists[] = {&a.m, &a.v};
  runStep<FullState, FullState>(context, a.step, AdamWRule(a.settings(), stepNumber(a.step)), lists);
}

void adamw8bit(Context& context, const AdamW8bit& a) {
  const std::vector<Tensor>* const lists[] = {&a.mIndex, &a.mAbsmax, &a.vIndex, &a.vAbsmax};
  runStep<SignedBytes, UnsignedBytes>(context, a.step, AdamWRule(a.settings(), stepNumber(a.step)), lists);
}

void lion(Context& context, const Lion& a) {
  const std::vector<Tensor>* const lists[] = {&a.m};
  runStep<FullState>(context, a.step, LionRule(a.settings(), stepNumber(a.step)), lists);
}

void lion8bit(Context& context, const Lion8bit& a) {
  const std::vector<Tensor>* const lists[] = {&a.mIndex, &a.mAbsmax};
  runStep<SignedBytes>(context, a.step, LionRule(a.settings(), stepNumber(a.step)), lists);
}

void ademamix(Context& context, const AdEMAMix& a) {
  const std::vector<Tensor>* const lists[] = {&a.m, &a.m2, &a.v};
  runStep<FullState, FullState, FullState>(context, a.step, AdEMAMixRule(a.settings(), stepNumber(a.step)), lists);
}

void sgd(Context& context, const Sgd& a) {
  const std::vector<Tensor>* const lists[] = {&a.m};
  if (a.momentum == 0) {
    runStep<>(context, a.step, SgdRule(a.settings(), stepNumber(a.step)));
  } else {
    runStep<FullState>(context, a.step, SgdRule(a.settings(), stepNumber(a.step)), lists);
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
