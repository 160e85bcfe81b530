// What the kernels on rows of logits share (ops/logits_process.cu, ops/logits_choose.cu): a block has a row.
//
// Errors of values. A kernel leaves what is wrong with its row in a tensor of the operation's own; the launcher reads
// it when the kernels are through, so that the operation itself fails, as on the CPU. That is one wait a call, and
// these operations run a few times a token.
//
// Cuts. Which elements are the first of an order until a sum or a number is reached is found without sorting: elements
// have 32-bit keys that grow along the order, and the key at which the cut falls is found bit by bit, with one pass
// over the row for each. Sums are in fp64, so where the cut falls does not depend on their order but for its last bits.
#pragma once

#include "cuda/device.h"
#include "ops/logits_rows.h"

namespace qlora::cuda {

constexpr float kForbidden = -INFINITY;

/// What can be wrong with a row.
enum RowError : int32_t { kNoError = 0, kNotFinite = 1, kNoTokenLeft = 2 };

/// What the kernels found, for which it waits; nothing in a rehearsal.
inline std::vector<int32_t> readErrors(Context& context, const int32_t* errors, int64_t B) {
  std::vector<int32_t> found(static_cast<size_t>(B));
  if (context.queue) context.queue->read(found.data(), errors, found.size() * sizeof(int32_t));
  return found;
}
/// Throws as ops/logits_rows.h does, for the first row of which `error` was found.
inline void throwError(const char* op, const std::vector<int32_t>& found, RowError error) {
  const auto row = std::find(found.begin(), found.end(), error) - found.begin();
  if (row == static_cast<int64_t>(found.size())) return;
  if (error == kNotFinite) failNotFinite(op, row);
  failNoTokenLeft(op, row);
}
inline void throwErrors(Context& context, const char* op, const int32_t* errors, int64_t B) {
  const std::vector<int32_t> found = readErrors(context, errors, B);
  throwError(op, found, kNotFinite);
  throwError(op, found, kNoTokenLeft);
}

/// Threads of a row's block.
inline int rowThreads(int64_t V) { return V <= 1024 ? kWarpSize : V <= 8192 ? kThreads : 1024; }

struct Smallest {
  template <class T>
  QLORA_DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

/// The row's largest value; kNotFinite if there is NaN or +infinity, kNoTokenLeft if there is nothing but -infinity.
struct RowState {
  float largest;
  int32_t error;
};
QLORA_DEVICE RowState lookAtRow(const float* z, int64_t V) {
  float largest = -INFINITY;
  int strange = 0;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    const float x = z[i];
    largest = fmaxf(largest, x);
    strange |= x != x || x == INFINITY;
  }
  largest = blockMax(largest);
  strange = blockReduce(strange, 0, Largest{});
  return {largest, strange ? kNotFinite : largest == -INFINITY ? kNoTokenLeft : kNoError};
}

/// Keys in the order of falling values; the zeros are equal.
QLORA_DEVICE uint32_t fallingKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000 ? bits : ~(bits | 0x80000000);
}
/// Keys in the order of rising values, none of which is below 0.
QLORA_DEVICE uint32_t risingKey(float x) { return __float_as_uint(x + 0.0f); }

/// An element of an order, if it takes part in it.
struct Element {
  uint32_t key;
  float weight;
  bool alive;
};

/// Of the elements at(i) whose key is below a limit.
template <class At>
QLORA_DEVICE double weightBelow(int64_t V, uint32_t limit, At&& at) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    const Element e = at(i);
    if (e.alive && e.key < limit) sum += static_cast<double>(e.weight);
  }
  return blockReduce(sum, 0.0, Sum{});
}

template <class At>
QLORA_DEVICE int64_t countBelow(int64_t V, uint32_t limit, At&& at) {
  int count = 0;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    const Element e = at(i);
    count += e.alive && e.key < limit;
  }
  return blockReduce(count, 0, Sum{});
}

/// The largest key for which isBefore(key) holds: that of the element at which an order is cut, if isBefore says that
/// what lies below the key does not suffice yet. It must hold for 0.
template <class IsBefore>
QLORA_DEVICE uint32_t largestKey(IsBefore&& isBefore) {
  uint32_t key = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = key | (1u << bit);
    if (isBefore(candidate)) key = candidate;
  }
  return key;
}

/// Elements with lower keys stay, of those with this key the first `quota` by their index.
struct Cut {
  uint32_t key;
  int64_t quota;
};
constexpr int64_t kAllOfThem = INT64_MAX;

/// The number of threads before this one whose flag is set, and in `total` that of all. By the whole block.
QLORA_DEVICE int rankInBlock(bool flag, int& total) {
  QLORA_SHARED_ARRAY(int, ofWarps, kWarpSize);
  const unsigned bits = ballot(flag);
  if (laneIndex() == 0) ofWarps[warpIndex()] = __popc(bits);
  syncBlock();
  int rank = __popc(bits & ((1u << laneIndex()) - 1));
  total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) {
    if (w < warpIndex()) rank += ofWarps[w];
    total += ofWarps[w];
  }
  syncBlock();
  return rank;
}

/// Calls keep(i, how many stay before it) for the elements that stay, drop(i) for others; in each thread in order.
template <class At, class Keep, class Drop>
QLORA_DEVICE void applyCut(int64_t V, const Cut& cut, At&& at, Keep&& keep, Drop&& drop) {
  int64_t equal = 0, kept = 0;
  for (int64_t base = 0; base < V; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const Element e = i < V ? at(i) : Element{0, 0.0f, false};
    int equalHere, keptHere;
    const int64_t rank = equal + rankInBlock(e.alive && e.key == cut.key, equalHere);
    const bool stays = e.alive && (e.key < cut.key || (e.key == cut.key && rank < cut.quota));
    const int64_t place = kept + rankInBlock(stays, keptHere);
    equal += equalHere;
    kept += keptHere;
    if (stays) {
      keep(i, place);
    } else if (i < V) {
      drop(i);
    }
  }
}

}  // namespace qlora::cuda
