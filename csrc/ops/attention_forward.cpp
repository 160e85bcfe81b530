#include <algorithm>
#include <cmath>

#include "ops/attention.h"
#include "ops/attention_decode.h"
#include "ops/attention_scores.h"

namespace qlora::QLORA_ISA {

namespace attention {

namespace {

/// What one thread works in.
template <class Math>
struct ForwardScratch {
  typename Math::Element* queries;  // vectors of queries
  typename Math::Element* weights;  // exp(s - max) of a panel
  float *scores, *out, *maximum, *sum;

  ForwardScratch(Scratch& scratch, int64_t depth, int64_t paddedD) {
    queries = scratch.take<typename Math::Element>(kQueries * depth);
    weights = scratch.take<typename Math::Element>(kKeys * kPanel);
    scores = scratch.take<float>(kKeys * kPanel);
    out = scratch.take<float>(kQueries * paddedD);
    maximum = scratch.take<float>(kQueries);
    sum = scratch.take<float>(kQueries);
  }
};

/// The online softmax of one panel: scores of `keys` keys become weights exp2(x - maximum), x = score * multiplier, and
/// what was summed so far is scaled to the new maximum. maximum and sum are in units of log2.
template <class Math>
void onlineSoftmax(int64_t keys, float multiplier, const float* scores, typename Math::Element* weights, float* maximum,
                   float* sum, float* correction) {
  for (int v = 0; v < 2; ++v) {
    const float* column = scores + v * kWidth;
    Vec largest = splat(-kInfinity);
    for (int64_t j = 0; j < keys; ++j) largest = attention::maximum(largest, load(column + j * kPanel));
    const Vec before = load(maximum + v * kWidth);
    const Vec now = attention::maximum(before, largest * multiplier);
    const Vec base = now == -kInfinity ? Vec{} : now;
    const Vec factor = exp2Of(before - base);
    Vec total[4] = {load(sum + v * kWidth) * factor};
    const int64_t groups = keys / Math::kPack;
    for (int64_t g = 0; g < groups; ++g) {
      Vec p[Math::kPack];
      for (int i = 0; i < Math::kPack; ++i) {
        p[i] = exp2Of(multiplyAdd(load(column + (g * Math::kPack + i) * kPanel), splat(multiplier), -base));
        total[i] += p[i];
      }
      Math::storeAlongRows(weights + g * kPanel + v * kWidth, p);
    }
    if (groups * Math::kPack < keys) {
      Vec p[2] = {exp2Of(multiplyAdd(load(column + (keys - 1) * kPanel), splat(multiplier), -base))};
      total[0] += p[0];
      Math::storeAlongRows(weights + groups * kPanel + v * kWidth, p);
    }
    store(sum + v * kWidth, total[0] + total[1]);
    store(maximum + v * kWidth, now);
    store(correction + v * kWidth, factor);
  }
}

template <class Math, class T>
void forward(Context& context, const AttentionForward& a) {
  using Element = typename Math::Element;
  const int64_t B = a.q.dim(0), Tq = a.q.dim(1), H = a.q.dim(2), D = a.q.dim(3), S = a.k.dim(1), Hkv = a.k.dim(2);
  const int64_t depth = divideUp(D, Math::kPack), paddedD = roundUp(D, kPanel);
  const int64_t keyBlocks = divideUp(longestKeyLength(a), kKeys), queryBlocks = divideUp(Tq, kQueries);
  const int64_t keyBlockSize = roundUp(depth, kChunk) * kKeys, valueBlockSize = paddedD * (kKeys / Math::kPack);
  Element* keys = context.scratch.take<Element>(B * Hkv * keyBlocks * keyBlockSize);
  Element* values = context.scratch.take<Element>(B * Hkv * keyBlocks * valueBlockSize);
  context.pool.parallelFor(B * Hkv * keyBlocks, [&](int64_t task, int) {
    const int64_t head = task / keyBlocks % Hkv, b = task / keyBlocks / Hkv, j0 = task % keyBlocks * kKeys;
    const int64_t at = ((b * S + j0) * Hkv + head) * D, rows = std::min<int64_t>(kKeys, keyLengthOf(a, b) - j0);
    if (rows <= 0) return;
    packAlongRow<Math>(a.k.data<T>() + at, Hkv * D, rows, D, kKeys, keys + task * keyBlockSize);
    packLanesOfColumns<Math>(a.v.data<T>() + at, Hkv * D, rows, D, kKeys, values + task * valueBlockSize);
  });

  ForwardScratch<Math>* threads = context.scratch.take<ForwardScratch<Math>>(context.pool.size());
  for (int i = 0; i < context.pool.size(); ++i) threads[i] = ForwardScratch<Math>(context.scratch, depth, paddedD);
  const float multiplier = a.softCap > 0 ? 1.0f : a.scale * kLog2E;

  context.pool.parallelFor(B * H * queryBlocks, [&](int64_t task, int thread) {
    [[maybe_unused]] const typename Math::Session session;
    const ForwardScratch<Math>& my = threads[thread];
    // The last block of queries, which sees most keys where attention is causal, first.
    const int64_t head = task % H, b = task / H / queryBlocks, block = queryBlocks - 1 - task / H % queryBlocks;
    const int64_t q0 = block * kQueries, q1 = std::min(Tq, q0 + kQueries);
    const Visibility rule = visibilityOf(a, b);
    const int64_t firstBlock = (b * Hkv + head / (H / Hkv)) * keyBlocks;
    packLanesOfRows<Math>(a.q.data<T>() + ((b * Tq + q0) * H + head) * D, H * D, q1 - q0, D, my.queries);
    std::fill(my.out, my.out + kQueries * paddedD, 0.0f);
    std::fill(my.maximum, my.maximum + kQueries, -kInfinity);
    std::fill(my.sum, my.sum + kQueries, 0.0f);

    const KeyRange all = visibleByPosition(rule, q0, q1, 0, rule.keyLength);
    for (int64_t j = all.begin / kKeys; j < divideUp(all.end, kKeys); ++j) {
      const int64_t j0 = j * kKeys;
      const Element* blockKeys = keys + (firstBlock + j) * keyBlockSize;
      const Element* blockValues = values + (firstBlock + j) * valueBlockSize;
      for (int64_t p0 = q0; p0 < q1; p0 += kPanel) {
        const int64_t p1 = std::min<int64_t>(q1, p0 + kPanel);
        KeyRange range = visibleKeys(rule, p0, p1, j0, std::min(rule.keyLength, j0 + kKeys));
        if (range.begin >= range.end) continue;
        if ((range.begin - j0) % Math::kPack) range = {range.begin - 1, range.end, true};
        const int64_t offset = range.begin - j0, n = range.end - range.begin;
        multiply<Math>(n, kPanel, AlongRow<Element>{blockKeys + offset * kChunk, kKeys * kChunk},
                       my.queries + (p0 - q0) * depth, depth, my.scores, kPanel, Sum::overwrite);
        if (a.softCap > 0) capScores(a.scale, a.softCap, n * kPanel, my.scores);
        if (range.partial) maskScores(rule, range, p0, my.scores);
        float correction[kPanel];
        onlineSoftmax<Math>(n, multiplier, my.scores, my.weights, my.maximum + (p0 - q0), my.sum + (p0 - q0),
                            correction);
        float* out = my.out + (p0 - q0) * paddedD;
        for (int64_t i = 0; i < p1 - p0; ++i) {
          if (correction[i] == 1.0f) continue;
          for (int64_t d = 0; d < paddedD; d += kWidth) {
            store(out + i * paddedD + d, load(out + i * paddedD + d) * correction[i]);
          }
        }
        for (int64_t d = 0; d < D; d += kPanel) {
          multiply<Math>(p1 - p0, std::min<int64_t>(kPanel, D - d), AlongColumn<Element>{my.weights},
                         blockValues + (d * kKeys + offset * kPanel) / Math::kPack, divideUp(n, Math::kPack), out + d,
                         paddedD, Sum::add);
        }
      }
    }
    float* logSumExp = a.logSumExp.data<float>() + (b * H + head) * Tq;
    for (int64_t i = q0; i < q1; ++i) {
      const float sum = my.sum[i - q0], inverse = sum == 0 ? 0.0f : 1.0f / sum;
      logSumExp[i] = sum == 0 ? -kInfinity : my.maximum[i - q0] * kLn2 + std::log(sum);
      const float* row = my.out + (i - q0) * paddedD;
      T* to = a.out.data<T>() + ((b * Tq + i) * H + head) * D;
      for (int64_t d = 0; d < D; ++d) to[d] = fromFloat<T>(row[d] * inverse);
    }
  });
}

void checkPastLength(const AttentionForward& a) {
  if (!a.pastLength.defined()) return;
  const int64_t most = a.k.dim(1) - a.q.dim(1);
  for (int64_t b = 0; b < a.q.dim(0); ++b) {
    const int32_t past = a.pastLength.data<int32_t>()[b];
    if (past < 0 || past > most) {
      fail("ERR_QLORA_SHAPE", "attention: pastLength[%lld] must be from 0 to %lld, got %d", static_cast<long long>(b),
           static_cast<long long>(most), past);
    }
  }
}

}  // namespace

}  // namespace attention

void attentionForward(Context& context, const AttentionForward& a) {
  attention::checkPastLength(a);
  if (a.q.dim(1) <= attention::kDecodeQueries) return attention::decode(context, a);
  attention::dispatchMath(
      a.q.dtype, [&](auto math, auto zero) { attention::forward<decltype(math), decltype(zero)>(context, a); });
}

}  // namespace qlora::QLORA_ISA
