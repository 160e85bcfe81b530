#include "ops/lora_linear.h"

#include <algorithm>

#include "simd/chunks.h"
#include "simd/dropout.h"
#include "simd/gemm.h"
#include "simd/linear.h"

namespace qlora::QLORA_ISA {

namespace {

/// mask * x as a matrix in scratch, of x's type.
GemmOperand dropped(Context& context, const Tensor& x, const DropoutMask& dropout) {
  const int64_t rows = leading(x), K = x.dim(-1);
  void* out = context.scratch.bytes(static_cast<size_t>(rows * K) * sizeOf(x.dtype));
  dispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = x.data<T>();
    T* to = static_cast<T*>(out);
    context.pool.parallelFor(rows, [&](int64_t row, int) {
      constexpr int64_t kPiece = 256;
      float factor[kPiece];
      for (int64_t k = 0; k < K; k += kPiece) {
        const int64_t first = row * K + k, n = std::min(kPiece, K - k);
        dropoutFactors(dropout, first, n, factor);
        for (int64_t i = 0; i < n; ++i) to[first + i] = fromFloat<T>(toFloat(from[first + i]) * factor[i]);
      }
    });
  });
  return {out, x.dtype, K};
}

/// y += x
void addTo(Context& context, const Tensor& x, const Tensor& y) {
  dispatchFloat(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* __restrict from = x.data<T>();
    T* __restrict to = y.data<T>();
    forChunks(context, y.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = fromFloat<T>(toFloat(from[i]) + toFloat(to[i]));
    });
  });
}

/// y of loraLinear's forward, and t.
void forward(Context& context, const LoraLinearForward& a) {
  const int64_t M = leading(a.x), K = a.weight.K, r = a.loraA.dim(0);
  const DropoutMask dropout{a.dropout, a.seed, a.stream};
  // What multiplies A also multiplies W, unless dropout sets them apart or W takes integers.
  PackedA packed;
  const PackedA* shared = nullptr;
  GemmOperand x = matrix(a.x);
  if (dropout.p > 0) {
    x = dropped(context, a.x, dropout);
  } else if (a.weight.data.dtype != DType::i8 && takesPacked(GemmForm::nt, a.x.dtype, M)) {
    packed = packA(context, GemmForm::nt, a.x.dtype, x, M, K);
    shared = &packed;
  }
  gemm(context, {.form = GemmForm::nt,
                 .compute = a.x.dtype,
                 .M = M,
                 .N = r,
                 .K = K,
                 .a = x,
                 .b = matrix(a.loraA),
                 .c = a.t.data<void>(),
                 .cDtype = a.t.dtype,
                 .cStride = r,
                 .packed = shared});
  const GemmExtra extra{.a = matrix(a.t), .b = matrix(a.loraB, a.scale), .K = r};
  linearForward(context, a.x, a.weight, a.bias, a.y, extra, shared);
}

}  // namespace

void loraLinearForward(Context& context, const LoraLinearForward& a) { forward(context, a); }

void loraLinearBackward(Context& context, const LoraLinearBackward& a) {
  const int64_t M = leading(a.x), N = a.weight.N, K = a.weight.K, r = a.loraA.dim(0);
  const DType compute = a.x.dtype;
  const DropoutMask dropout{a.dropout, a.seed, a.stream};
  const PackedA dy = gemmThatPacks(context, {.form = GemmForm::tn,
                                             .compute = compute,
                                             .M = N,
                                             .N = r,
                                             .K = M,
                                             .a = matrix(a.dy),
                                             .b = matrix(a.t),
                                             .c = a.dloraB.data<void>(),
                                             .cDtype = DType::f32,
                                             .cStride = r,
                                             .alpha = a.scale,
                                             .store = GemmStore::add});
  float* u = context.scratch.take<float>(M * r);
  gemm(context, {.form = GemmForm::nn,
                 .compute = compute,
                 .M = M,
                 .N = r,
                 .K = N,
                 .a = matrix(a.dy),
                 .b = matrix(a.loraB, a.scale),
                 .c = u,
                 .cDtype = DType::f32,
                 .cStride = r,
                 .packed = &dy});
  const GemmOperand uMatrix{u, DType::f32, r};
  if (a.dx.defined()) {
    gemm(context, {.form = GemmForm::nn,
                   .compute = compute,
                   .M = M,
                   .N = K,
                   .K = N,
                   .a = matrix(a.dy),
                   .b = {nullptr, DType::f32, K, &a.weight},
                   .c = a.dx.data<void>(),
                   .cDtype = a.dx.dtype,
                   .cStride = K,
                   .extra = {.a = uMatrix, .b = matrix(a.loraA), .K = r, .dropout = dropout},
                   .packed = &dy});
  }
  gemm(context, {.form = GemmForm::tn,
                 .compute = compute,
                 .M = r,
                 .N = K,
                 .K = M,
                 .a = uMatrix,
                 .b = dropout.p > 0 ? dropped(context, a.x, dropout) : matrix(a.x),
                 .c = a.dloraA.data<void>(),
                 .cDtype = DType::f32,
                 .cStride = K,
                 .store = GemmStore::add});
}

void projections(Context& context, const Projections& a) {
  for (int i = 0; i < a.count; ++i) {
    const Projection& p = a.layers[i];
    Scratch scratch = context.scratch.nested();
    Context own{context.pool, scratch};
    if (p.loraA.defined()) {
      forward(own, {a.x, p.weight, p.bias, p.loraA, p.loraB, p.y, p.t, p.scale, 0, 0, 0});
    } else {
      linearForward(own, a.x, p.weight, p.bias, p.y, {}, nullptr);
    }
    if (p.residual.defined()) addTo(context, p.residual, p.y);
  }
}

}  // namespace qlora::QLORA_ISA
