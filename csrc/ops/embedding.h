// Rows of a table, by id.
//
//   y[i, c] = table[ids[i], c] * scale                  scale sqrt(C) for Gemma, else 1
//   dtable[ids[i], c] += dy[i, c] * scale               over i in rising order
//
// table [V, C] of any floating-point type; ids i32 of any shape; y, dy [ids.., C] of any floating-point type (rounded
// once); dtable f32 [V, C]. An id outside [0, V) fails with ERR_QLORA_TOKEN_ID.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

inline void checkEmbedding(const char* op, const Tensor& table, const Tensor& ids, const char* valueName,
                           const Tensor& value) {
  checkShape(op, "table", table, {-1, -1});
  checkDType(op, "ids", ids, {DType::i32});
  checkFloat(op, valueName, value);
  bool same = value.rank == ids.rank + 1 && value.dim(-1) == table.dim(1);
  for (int i = 0; same && i < ids.rank; ++i) same = value.shape[i] == ids.shape[i];
  if (!same) {
    fail("ERR_QLORA_SHAPE", "%s: %s must have the shape of ids, %s, with %lld behind it, got %s", op, valueName,
         shapeText(ids).c_str(), static_cast<long long>(table.dim(1)), shapeText(value).c_str());
  }
}

}  // namespace detail

struct EmbeddingForward {
  Tensor table, ids, y;
  float scale;

  template <class V>
  void visit(V& v) {
    v.in(table);
    v.in(ids);
    v.out(y);
    v.value(scale);
  }
  void check() const {
    checkFloat("embedding", "table", table);
    detail::checkEmbedding("embedding", table, ids, "y", y);
  }
};

struct EmbeddingBackward {
  Tensor dy, ids, dtable;
  float scale;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(ids);
    v.accumulate(dtable);
    v.value(scale);
  }
  void check() const {
    checkDType("embeddingBackward", "dtable", dtable, {DType::f32});
    detail::checkEmbedding("embeddingBackward", dtable, ids, "dy", dy);
  }
};

}  // namespace qlora
