#include "ops/embedding.h"

#include <algorithm>

namespace qlora::QLORA_ISA {

namespace {

constexpr int64_t kRowsPerTask = 16;
// Columns of the gradient that one task owns: it adds every row in order, so no two tasks meet.
constexpr int64_t kColumnsPerTask = 128;

void checkIds(const Tensor& ids, int64_t V) {
  const int32_t* id = ids.data<int32_t>();
  const int64_t n = ids.size();
  for (int64_t i = 0; i < n; ++i) {
    if (id[i] < 0 || id[i] >= V) {
      fail("ERR_QLORA_TOKEN_ID", "embedding: token id %d at position %lld is outside the vocabulary of %lld", id[i],
           static_cast<long long>(i), static_cast<long long>(V));
    }
  }
}

}  // namespace

void embeddingForward(Context& context, const EmbeddingForward& a) {
  const int64_t V = a.table.dim(0), C = a.table.dim(1), rows = a.ids.size();
  checkIds(a.ids, V);
  const int32_t* ids = a.ids.data<int32_t>();
  dispatchFloat(a.table.dtype, [&](auto from) {
    dispatchFloat(a.y.dtype, [&](auto to) {
      using X = decltype(from);
      using Y = decltype(to);
      const X* table = a.table.data<X>();
      Y* y = a.y.data<Y>();
      context.pool.parallelFor((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
        for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
          const X* __restrict x = table + ids[i] * C;
          Y* __restrict yi = y + i * C;
          for (int64_t c = 0; c < C; ++c) yi[c] = fromFloat<Y>(toFloat(x[c]) * a.scale);
        }
      });
    });
  });
}

void embeddingBackward(Context& context, const EmbeddingBackward& a) {
  const int64_t V = a.dtable.dim(0), C = a.dtable.dim(1), rows = a.ids.size();
  checkIds(a.ids, V);
  const int32_t* ids = a.ids.data<int32_t>();
  float* dtable = a.dtable.data<float>();
  dispatchFloat(a.dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* dy = a.dy.data<T>();
    context.pool.parallelFor((C + kColumnsPerTask - 1) / kColumnsPerTask, [&](int64_t task, int) {
      const int64_t begin = task * kColumnsPerTask, end = std::min(C, begin + kColumnsPerTask);
      for (int64_t i = 0; i < rows; ++i) {
        const T* __restrict from = dy + i * C;
        float* __restrict to = dtable + ids[i] * C;
        for (int64_t c = begin; c < end; ++c) to[c] += toFloat(from[c]) * a.scale;
      }
    });
  });
}

}  // namespace qlora::QLORA_ISA
