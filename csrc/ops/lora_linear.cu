#include "ops/lora_linear.h"

#include "cuda/gemm.h"
#include "cuda/map.h"

namespace qlora::cuda {

namespace {

struct Dropped {
  DropoutMask dropout;
  QLORA_DEVICE float operator()(int64_t i, float x) const { return x * dropoutFactor(dropout, i); }
};

/// mask * x as a matrix in scratch, of x's type; x itself without dropout.
Elements dropped(Context& context, const Tensor& x, const DropoutMask& dropout) {
  if (dropout.p == 0) return elementsOf(x);
  void* out = context.scratch.bytes(static_cast<size_t>(x.size()) * sizeOf(x.dtype));
  dispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    map(context, x.size(), Dropped{dropout}, static_cast<T*>(out), x.data<const T>());
  });
  return {.data = out, .dtype = x.dtype, .stride = x.dim(-1)};
}

}  // namespace

void loraLinearForward(Context& context, const LoraLinearForward& a) {
  const int64_t M = a.x.rows(), K = a.weight.K, r = a.loraA.dim(0);
  gemm(context, {.form = GemmForm::nt,
                 .compute = a.x.dtype,
                 .M = M,
                 .N = r,
                 .K = K,
                 .a = dropped(context, a.x, {a.dropout, a.seed, a.stream}),
                 .b = elementsOf(a.loraA),
                 .out = {.c = a.t.data<void>(), .dtype = a.t.dtype, .stride = r}});
  linearForward(context, a.x, a.weight, a.bias, a.y,
                {.a = elementsOf(a.t), .b = elementsOf(a.loraB, a.scale), .K = r});
}

void loraLinearBackward(Context& context, const LoraLinearBackward& a) {
  const int64_t M = a.x.rows(), N = a.weight.N, K = a.weight.K, r = a.loraA.dim(0);
  const DType compute = a.x.dtype;
  const DropoutMask dropout{a.dropout, a.seed, a.stream};
  // Of the compute type, since every product that reads it rounds it to that.
  const Elements u{.data = context.scratch.bytes(static_cast<size_t>(M * r) * sizeOf(compute)),
                   .dtype = compute,
                   .stride = r};
  gemm(context, {.form = GemmForm::nn,
                 .compute = compute,
                 .M = M,
                 .N = r,
                 .K = N,
                 .a = elementsOf(a.dy),
                 .b = elementsOf(a.loraB, a.scale),
                 .out = {.c = const_cast<void*>(u.data), .dtype = compute, .stride = r}});
  if (a.dx.defined()) {
    gemm(context, {.form = GemmForm::nn,
                   .compute = compute,
                   .M = M,
                   .N = K,
                   .K = N,
                   .a = elementsOf(a.dy),
                   .b = elementsOf(a.weight),
                   .out = {.c = a.dx.data<void>(), .dtype = compute, .stride = K},
                   .extra = {.a = u, .b = elementsOf(a.loraA), .K = r, .dropout = dropout}});
  }
  gemm(context, {.form = GemmForm::tn,
                 .compute = compute,
                 .M = N,
                 .N = r,
                 .K = M,
                 .a = elementsOf(a.dy),
                 .b = elementsOf(a.t),
                 .out = {.c = a.dloraB.data<void>(), .dtype = DType::f32, .stride = r, .alpha = a.scale, .add = true}});
  gemm(context, {.form = GemmForm::tn,
                 .compute = compute,
                 .M = r,
                 .N = K,
                 .K = M,
                 .a = u,
                 .b = dropped(context, a.x, dropout),
                 .out = {.c = a.dloraA.data<void>(), .dtype = DType::f32, .stride = K, .add = true}});
}

}  // namespace qlora::cuda
