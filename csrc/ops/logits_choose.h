// The choice of the next token of each sequence from its logits, which logits_process.h prepares.
//
//   argmax           the largest; the lowest id among equals
//   sample           drawn from softmax, with the uniform number of philox(seed, stream, row)
//   beamCandidates   of all continuations of B beams the K with the largest keys, best first
//                      score[b, v] = logProbs[b, v] + running[b]
//                      key[b, v]   = score[b, v] + noise * g[b, v],  g = -log(-log u),  u of philox(seed, stream, b V +
//                      v)
//                    noise 0 takes the best; with noise 1 it is K draws from softmax(score) without replacement, in the
//                    order in which they are drawn (Kool et al., "Stochastic beams and where to find them", 2019)
//
// logits and logProbs f32 [B, V]; ids i32 [B]; running f32 [B]; places i32 [K], each b V + v, and scores f32 [K].
// -infinity is a forbidden token, and -infinity in `running` a beam that is dead. Where fewer than K continuations are
// left, the rest of scores is -infinity. NaN and +infinity fail with ERR_QLORA_NON_FINITE; for argmax and sample a row
// of nothing but -infinity with ERR_QLORA_NO_TOKEN_LEFT.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "ops/logits_rows.h"

namespace qlora {

struct Argmax {
  Tensor logits, ids;

  template <class V>
  void visit(V& v) {
    v.in(logits);
    v.out(ids);
  }
  void check() const {
    detail::checkLogitsShape("argmax", logits);
    checkDType("argmax", "ids", ids, {DType::i32});
    checkShape("argmax", "ids", ids, {logits.dim(0)});
  }
};

struct Sample {
  Tensor logits, ids;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(logits);
    v.out(ids);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    detail::checkLogitsShape("sample", logits);
    checkDType("sample", "ids", ids, {DType::i32});
    checkShape("sample", "ids", ids, {logits.dim(0)});
  }
};

struct BeamCandidates {
  Tensor logProbs, running, places, scores;
  float noise;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(logProbs);
    v.in(running);
    v.out(places);
    v.out(scores);
    v.value(noise);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    detail::checkLogitsShape("beamCandidates", logProbs);
    checkDType("beamCandidates", "running", running, {DType::f32});
    checkShape("beamCandidates", "running", running, {logProbs.dim(0)});
    checkDType("beamCandidates", "places", places, {DType::i32});
    checkShape("beamCandidates", "places", places, {-1});
    checkThat(places.dim(0) > 0, "beamCandidates", "there must be at least one place");
    checkDType("beamCandidates", "scores", scores, {DType::f32});
    checkShape("beamCandidates", "scores", scores, {places.dim(0)});
    checkThat(logProbs.size() < (int64_t{1} << 31), "beamCandidates", "B V must be below 2^31");
    checkThat(noise >= 0, "beamCandidates", "noise must not be negative");
  }
};

}  // namespace qlora
