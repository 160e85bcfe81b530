// The next token of each sequence, from its logits, as transformers' logits processors do it, in this order:
//
//   temperature   z / temperature; 0 takes the largest logit (the lowest index among equals), and nothing below applies
//   top-k         logits below the topK-th largest are dropped; 0 keeps all
//   top-p         of the rest, by falling probability, a token is kept while those before it sum to less than topP; 1
//                 keeps all, and the first is always kept
//   draw          from softmax over what is left, with the uniform number of philox(seed, stream, row)
//
// logits f32 [B, V]; ids i32 [B]; -infinity is a forbidden token. A row with NaN, with +infinity or with nothing but
// -infinity fails with ERR_QLORA_NON_FINITE. Probabilities in fp32, their sums in fp64. Source of top-p: Holtzman et
// al., "The curious case of neural text degeneration", 2020.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct Sample {
  Tensor logits, ids;
  float temperature;
  int topK;
  float topP;
  uint64_t seed, stream;

  template <class V>
  void visit(V& v) {
    v.in(logits);
    v.out(ids);
    v.value(temperature);
    v.value(topK);
    v.value(topP);
    v.value(seed);
    v.value(stream);
  }
  void check() const {
    checkDType("sample", "logits", logits, {DType::f32});
    checkShape("sample", "logits", logits, {-1, -1});
    checkThat(logits.dim(1) > 0, "sample", "logits must have at least one column");
    checkDType("sample", "ids", ids, {DType::i32});
    checkShape("sample", "ids", ids, {logits.dim(0)});
    checkThat(temperature >= 0, "sample", "temperature must not be negative");
    checkThat(topK >= 0, "sample", "topK must not be negative");
    checkThat(topP > 0 && topP <= 1, "sample", "topP must be above 0 and at most 1");
  }
};

}  // namespace qlora
