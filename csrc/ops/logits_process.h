// What changes logits between the model and the choice of a token: transformers' logits processors, in its order.
//
//   logSoftmax       z - log sum e^z; beams compare these, and what follows is applied to them
//   constrainLogits  repetition penalty: a token that was seen has z / p where z >= 0, and z * p where it is below
//                    no repeated n-grams: a token that would complete n tokens which were seen in this order is
//                    forbidden (n = 1: each token that was seen; fewer than n seen: none)
//                    the tokens of `forbidden`: the ends of a text that has to be longer
//   warpLogits       temperature: z / temperature
//                    top-k: what is below the topK-th largest is dropped; 0 keeps all
//                    top-p: of the rest, by falling probability, a token is kept while those before it sum to less
//                    than topP; 1 keeps all
//                    typical-p: of the rest, by rising distance |log p + H| with the entropy H, so many are kept that
//                    their probabilities first reach typicalP, and what is as far as the last of them; 1 keeps all
//                    each of the three keeps at least `keep`
//
// logits and out f32 [B, V]; -infinity is a forbidden or dropped token. seen i32 [B, S], of which the first seenLength
// columns count, those of a row that is shorter behind a beginning of -1; forbidden i32 [E]. NaN and +infinity fail with ERR_QLORA_NON_FINITE, an id outside [0, V) with
// ERR_QLORA_TOKEN_ID, and a row of which constrainLogits leaves nothing with ERR_QLORA_NO_TOKEN_LEFT. Probabilities in
// fp32, their sums in fp64. Sources: Keskar et al., "CTRL", 2019 (penalty); Holtzman et al., "The curious case of
// neural text degeneration", 2020 (top-p); Meister et al., "Locally typical sampling", 2023.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "ops/logits_rows.h"

namespace qlora {

struct LogSoftmax {
  Tensor logits, out;

  template <class V>
  void visit(V& v) {
    v.in(logits);
    v.out(out);
  }
  void check() const { detail::checkLogitsOut("logSoftmax", logits, out); }
};

struct ConstrainLogits {
  Tensor logits, seen, forbidden, out;
  int64_t seenLength;
  float repetitionPenalty;  // 1 changes nothing
  int64_t ngramSize;        // 0 forbids nothing

  template <class V>
  void visit(V& v) {
    v.in(logits);
    v.optionalIn(seen);
    v.optionalIn(forbidden);
    v.out(out);
    v.value(seenLength);
    v.value(repetitionPenalty);
    v.value(ngramSize);
  }
  void check() const {
    detail::checkLogitsOut("constrainLogits", logits, out);
    if (seen.defined()) {
      checkDType("constrainLogits", "seen", seen, {DType::i32});
      checkShape("constrainLogits", "seen", seen, {logits.dim(0), -1});
      checkThat(seenLength >= 0 && seenLength <= seen.dim(1), "constrainLogits",
                "seenLength must be from 0 to the number of columns of seen");
    }
    if (forbidden.defined()) {
      checkDType("constrainLogits", "forbidden", forbidden, {DType::i32});
      checkShape("constrainLogits", "forbidden", forbidden, {-1});
    }
    checkThat(repetitionPenalty > 0, "constrainLogits", "repetitionPenalty must be above 0");
    checkThat(ngramSize >= 0, "constrainLogits", "ngramSize must not be negative");
  }
};

struct WarpLogits {
  Tensor logits, out;
  float temperature;
  int64_t topK;
  float topP, typicalP;
  int64_t keep;

  template <class V>
  void visit(V& v) {
    v.in(logits);
    v.out(out);
    v.value(temperature);
    v.value(topK);
    v.value(topP);
    v.value(typicalP);
    v.value(keep);
  }
  void check() const {
    detail::checkLogitsOut("warpLogits", logits, out);
    checkThat(temperature > 0, "warpLogits", "temperature must be above 0");
    checkThat(topK >= 0, "warpLogits", "topK must not be negative");
    checkThat(topP > 0 && topP <= 1, "warpLogits", "topP must be above 0 and at most 1");
    checkThat(typicalP > 0 && typicalP <= 1, "warpLogits", "typicalP must be above 0 and at most 1");
    checkThat(keep >= 1, "warpLogits", "keep must be at least 1");
  }
};

}  // namespace qlora
