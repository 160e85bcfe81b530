// A step's scalars depend on what is known on the device only (norm, counters, scale), so a kernel of one thread
// computes them before the update. Then a block has a piece of a parameter, 256 elements at a time, which is the block
// of 8-bit state. Paged state goes through a slot on the device.
#include "core/codes.h"
#include "core/page_file.h"
#include "cuda/tensor_list.h"
#include "ops/optimizer.h"
#include "simd/block_scale.h"
#include "simd/dynamic_map.h"

namespace qlora::cuda {

namespace {

static_assert(kThreads == kDynamicBlock);

struct Maps {
  const DynamicMap* map[2] = {nullptr, nullptr};
};

/// As FullState and ByteState of simd/dynamic_state.h, of a thread's element. Every thread calls store.
struct Floats {
  static constexpr int kArrays = 1;

  static QLORA_DEVICE float load(char* const* at, int64_t i, const Maps&) {
    return reinterpret_cast<const float*>(at[0])[i];
  }
  static QLORA_DEVICE void store(char* const* at, int64_t i, bool mine, float value, const Maps&) {
    if (mine) reinterpret_cast<float*>(at[0])[i] = value;
  }
};

template <DynamicMapKind kind>
struct Bytes {
  static constexpr int kArrays = 2;

  static QLORA_DEVICE float load(char* const* at, int64_t i, const Maps& maps) {
    const float absmax = reinterpret_cast<const float*>(at[1])[i / kDynamicBlock];
    const uint8_t index = reinterpret_cast<const uint8_t*>(at[0])[i];
    // Before the first step the indices say nothing yet.
    return absmax == 0.0f ? 0.0f : maps.map[static_cast<int>(kind)]->code[index] * absmax;
  }
  static QLORA_DEVICE void store(char* const* at, int64_t i, bool mine, float value, const Maps& maps) {
    const DynamicMap& map = *maps.map[static_cast<int>(kind)];
    // Over bit patterns, as simd/block_scale.h says.
    const uint32_t magnitude = mine ? __float_as_uint(value) & 0x7fffffffu : 0u;
    const float absmax = __uint_as_float(blockReduce(magnitude, 0u, Largest{})), inverse = blockInverse(absmax);
    if (i % kDynamicBlock == 0) reinterpret_cast<float*>(at[1])[i / kDynamicBlock] = absmax;
    if (!mine) return;
    reinterpret_cast<uint8_t*>(at[0])[i] = guardedIndex<kind>(map, value, dynamicIndex(map, value * inverse));
  }
};

using SignedBytes = Bytes<DynamicMapKind::signedMap>;
using UnsignedBytes = Bytes<DynamicMapKind::unsignedMap>;

template <class Rule>
struct Prepared {
  Rule rule;
  float factor;
  bool applies;
};

template <class Rule>
__global__ void prepareKernel(typename Rule::Settings settings, double maxNorm, const float* norm,
                              const float* lossScale, const int32_t* counters, Prepared<Rule>* prepared,
                              float* applied) {
  if (threadIdx.x != 0) return;
  const bool finite = norm[1] != 0;
  *applied = finite ? 1.0f : 0.0f;
  *prepared = {Rule(settings, static_cast<double>(counters[0]) + 1), gradientFactor(norm[0], *lossScale, maxNorm),
               finite};
}

template <int arrays, class Rule, class... States>
__global__ void updateKernel(const Place<arrays>* places, const Prepared<Rule>* prepared, [[maybe_unused]] Maps maps) {
  if (!prepared->applies) return;
  const Place<arrays> place = places[blockIdx.x];
  const Rule rule = prepared->rule;
  const float factor = prepared->factor;
  float* p = reinterpret_cast<float*>(place.at[0]);
  const float* g = reinterpret_cast<const float*>(place.at[1]);
  for (int64_t block = 0; block < place.count; block += kDynamicBlock) {
    const int64_t i = block + threadIdx.x;
    const bool mine = i < place.count;
    float state[sizeof...(States) + 1] = {};
    if (mine) {
      [[maybe_unused]] int s = 0, array = 2;
      ((state[s++] = States::load(place.at + array, i, maps), array += States::kArrays), ...);
      float value = p[i];
      if constexpr (sizeof...(States) == 0) rule(value, g[i] * factor);
      if constexpr (sizeof...(States) == 1) rule(value, g[i] * factor, state[0]);
      if constexpr (sizeof...(States) == 2) rule(value, g[i] * factor, state[0], state[1]);
      if constexpr (sizeof...(States) == 3) rule(value, g[i] * factor, state[0], state[1], state[2]);
      p[i] = value;
    }
    [[maybe_unused]] int s = 0, array = 2;
    ((States::store(place.at + array, i, mine, state[s++], maps), array += States::kArrays), ...);
  }
}

const DynamicMap* sendMap(Context& context, DynamicMapKind kind) {
  DynamicMap* map = context.scratch.take<DynamicMap>(1);
  if (context.queue) context.queue->write(map, &dynamicMap(kind), sizeof *map);
  return map;
}

/// Places of the parameters that streamPages has in a slot, which is at `slot` on the device.
template <int arrays>
Places<arrays> placesOfRuns(Context& context, const PagedArray (&lists)[arrays], char* slot, const PagedRun* runs,
                            int64_t count) {
  std::vector<Place<arrays>> places;
  for (const PagedRun* run = runs; run < runs + count; ++run) {
    for (int64_t begin = 0; begin < run->count; begin += kPiece) {
      Place<arrays> place{{}, std::min(kPiece, run->count - begin)};
      for (int k = 0; k < arrays; ++k) {
        char* start = k < 2 ? (*lists[k].list)[run->tensor].template data<char>() + run->begin * lists[k].itemBytes
                            : slot + run->at[k - 2];
        place.at[k] = start + begin / lists[k].elements * lists[k].itemBytes;
      }
      places.push_back(place);
    }
  }
  return sendPlaces(context, places);
}

/// Bytes of a slot whose last run that is: its arrays follow each other.
size_t usedBytes(const PagedArray* arrays, int count, const PagedRun& last) {
  const PagedArray& array = arrays[count - 1];
  const int64_t items = (last.count + array.elements - 1) / array.elements;
  return last.at[count - 1] + static_cast<size_t>(items * array.itemBytes);
}

/// What every optimizer shares. `lists` has those of each state in turn.
template <class Rule, class... States, size_t arrays>
void runStep(Context& context, const OptimizerStep& a, const typename Rule::Settings& settings,
             const PagedArray (&lists)[arrays]) {
  constexpr int kArrays = static_cast<int>(arrays);
  static_assert(kArrays == 2 + (0 + ... + States::kArrays));
  auto* prepared = context.scratch.take<Prepared<Rule>>(1);
  launch(context, prepareKernel<Rule>, int64_t{1}, kWarpSize, 0, settings, a.maxNorm, a.norm.data<float>(),
         a.lossScale.data<float>(), a.counters.data<int32_t>(), prepared, a.applied.data<float>());
  if (a.params.empty()) return;
  Maps maps;
  // State of floats has no second array.
  if constexpr (kArrays > 2 + sizeof...(States)) {
    maps = {{sendMap(context, DynamicMapKind::signedMap), sendMap(context, DynamicMapKind::unsignedMap)}};
  }
  const auto update = [&](Context& with, const Places<kArrays>& places) {
    void (*const kernel)(const Place<kArrays>*, const Prepared<Rule>*, Maps) = updateKernel<kArrays, Rule, States...>;
    launch(with, kernel, places.count, kThreads, 0, places.data, prepared, maps);
  };
  PageFile* pages = kArrays > 2 ? (*lists[kArrays - 1].list)[0].storage->pages.get() : nullptr;
  if (!pages) return update(context, placesOf(context, lists));

  char* onDevice = context.scratch.take<char>(static_cast<int64_t>(pages->slotBytes()));
  // Each batch waits anyway; a step that is skipped leaves the file alone.
  if (context.queue) {
    float finite = 0;
    context.queue->read(&finite, a.norm.data<float>() + 1, sizeof finite);
    if (finite == 0) return;
  }
  auto updateSlot = [&](char* slot, const PagedRun* runs, int64_t count) {
    if (!context.queue) return;
    Scratch scratch = context.scratch.nested();
    Context with{context.pool, scratch, context.queue, context.device};
    const size_t used = usedBytes(lists + 2, kArrays - 2, runs[count - 1]);
    context.queue->write(onDevice, slot, used);
    update(with, placesOfRuns(with, lists, onDevice, runs, count));
    context.queue->read(slot, onDevice, used);
  };
  pages->stream(
      a.params, lists + 2, kArrays - 2, kPiece,
      [](void* body, char* slot, const PagedRun* runs, int64_t count) {
        (*static_cast<decltype(updateSlot)*>(body))(slot, runs, count);
      },
      &updateSlot);
}

__global__ void finishKernel(const float* norm, int32_t* counters, float* lossScale, float* result,
                             int64_t growthInterval) {
  if (threadIdx.x != 0) return;
  const bool finite = norm[1] != 0;
  const float scale = *lossScale;
  result[0] = norm[0] / scale;
  result[1] = finite ? 1.0f : 0.0f;
  result[2] = scale;
  counters[0] += finite ? 1 : 0;
  counters[1] = finite ? counters[1] + 1 : 0;
  if (growthInterval == 0) return;
  if (!finite) {
    *lossScale = scale / 2 > 1.0f ? scale / 2 : 1.0f;
  } else if (counters[1] == growthInterval) {
    *lossScale = scale * 2;
    counters[1] = 0;
  }
}

constexpr int64_t kBlock = kDynamicBlock;

}  // namespace

void adamw(Context& context, const AdamW& a) {
  const OptimizerStep& s = a.step;
  runStep<AdamWRule, Floats, Floats>(context, s, a.settings(),
                                     {{&s.params, 1, 4}, {&s.grads, 1, 4}, {&a.m, 1, 4}, {&a.v, 1, 4}});
}

void adamw8bit(Context& context, const AdamW8bit& a) {
  const OptimizerStep& s = a.step;
  runStep<AdamWRule, SignedBytes, UnsignedBytes>(context, s, a.settings(),
                                                 {{&s.params, 1, 4},
                                                  {&s.grads, 1, 4},
                                                  {&a.mIndex, 1, 1},
                                                  {&a.mAbsmax, kBlock, 4},
                                                  {&a.vIndex, 1, 1},
                                                  {&a.vAbsmax, kBlock, 4}});
}

void lion(Context& context, const Lion& a) {
  const OptimizerStep& s = a.step;
  runStep<LionRule, Floats>(context, s, a.settings(), {{&s.params, 1, 4}, {&s.grads, 1, 4}, {&a.m, 1, 4}});
}

void lion8bit(Context& context, const Lion8bit& a) {
  const OptimizerStep& s = a.step;
  runStep<LionRule, SignedBytes>(context, s, a.settings(),
                                 {{&s.params, 1, 4}, {&s.grads, 1, 4}, {&a.mIndex, 1, 1}, {&a.mAbsmax, kBlock, 4}});
}

void ademamix(Context& context, const AdEMAMix& a) {
  const OptimizerStep& s = a.step;
  runStep<AdEMAMixRule, Floats, Floats, Floats>(
      context, s, a.settings(), {{&s.params, 1, 4}, {&s.grads, 1, 4}, {&a.m, 1, 4}, {&a.m2, 1, 4}, {&a.v, 1, 4}});
}

void sgd(Context& context, const Sgd& a) {
  const OptimizerStep& s = a.step;
  if (a.momentum == 0) {
    runStep<SgdRule>(context, s, a.settings(), {{&s.params, 1, 4}, {&s.grads, 1, 4}});
  } else {
    runStep<SgdRule, Floats>(context, s, a.settings(), {{&s.params, 1, 4}, {&s.grads, 1, 4}, {&a.m, 1, 4}});
  }
}

void finishStep(Context& context, const FinishStep& a) {
  launch(context, finishKernel, int64_t{1}, kWarpSize, 0, a.norm.data<float>(), a.counters.data<int32_t>(),
         a.lossScale.data<float>(), a.result.data<float>(), a.growthInterval);
}

}  // namespace qlora::cuda
