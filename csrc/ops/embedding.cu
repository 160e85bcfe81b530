// Ids that JavaScript wrote are checked before the launch, as on the CPU. Those that come from another operation, which
// chooses tokens, are in the vocabulary; were one not, its row would be NaN.
#include "cuda/rows.h"
#include "ops/embedding.h"

namespace qlora::cuda {

namespace {

/// Blocks that share the ids of the gradient: each adds those of its own in order, so that no two meet.
constexpr unsigned kIdGroups = 32;

void checkIds(Context& context, const Tensor& ids, int64_t V) {
  if (!ids.storage->hostCopy) return;
  const std::vector<int32_t> values = hostValues(context, ids);
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0 || values[i] >= V) {
      fail("ERR_QLORA_TOKEN_ID", "embedding: token id %d at position %zu is outside the vocabulary of %lld", values[i],
           i, static_cast<long long>(V));
    }
  }
}

template <int count, class X, class Y>
__global__ void forwardKernel(int64_t rows, int64_t V, int64_t C, const X* table, const int32_t* ids, Y* y,
                              float scale) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t id = ids[i];
    const bool known = id >= 0 && id < V;
    forPacks<count>(C, [&](int64_t c) {
      Pack<X, count> in{};
      if (known) in = loadPack<count>(table + id * C + c);
      Pack<Y, count> out;
#pragma unroll
      for (int k = 0; k < count; ++k) out.value[k] = fromFloat<Y>(known ? toFloat(in.value[k]) * scale : NAN);
      storePack<count>(y + i * C + c, out);
    });
  }
}

/// A thread has a column of the ids of its group.
template <class T>
__global__ void backwardKernel(int64_t rows, int64_t V, int64_t C, const T* dy, const int32_t* ids, float* dtable,
                               float scale) {
  const int64_t c = threadIndex();
  if (c >= C) return;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t id = ids[i];
    if (id >= 0 && id < V && id % gridDim.y == blockIdx.y) dtable[id * C + c] += toFloat(dy[i * C + c]) * scale;
  }
}

}  // namespace

void embeddingForward(Context& context, const EmbeddingForward& a) {
  const int64_t V = a.table.dim(0), C = a.table.dim(1), rows = a.ids.size();
  checkIds(context, a.ids, V);
  dispatchFloat(a.table.dtype, [&](auto from) {
    dispatchFloat(a.y.dtype, [&](auto to) {
      using X = decltype(from);
      using Y = decltype(to);
      dispatchPack<std::min(kPack<X>, kPack<Y>)>(C, [&](auto pack) {
        launch(context, forwardKernel<decltype(pack)::value, X, Y>, rowBlocks(rows), kThreads, 0, rows, V, C,
               a.table.data<X>(), a.ids.data<int32_t>(), a.y.data<Y>(), a.scale);
      });
    });
  });
}

void embeddingBackward(Context& context, const EmbeddingBackward& a) {
  const int64_t V = a.dtable.dim(0), C = a.dtable.dim(1);
  checkIds(context, a.ids, V);
  dispatchFloat(a.dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>((C + kThreads - 1) / kThreads), kIdGroups);
    launch(context, backwardKernel<T>, grid, kThreads, 0, a.ids.size(), V, C, a.dy.data<T>(), a.ids.data<int32_t>(),
           a.dtable.data<float>(), a.scale);
  });
}

}  // namespace qlora::cuda
