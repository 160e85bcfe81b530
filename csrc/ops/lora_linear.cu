#include "cuda/gemm.h"
#include "cuda/map.h"
#include "ops/lora_linear.h"

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

/// t = x A^T
Gemm downGemm(const Tensor& loraA, const Elements& x, int64_t M, const Tensor& t) {
  const int64_t r = loraA.dim(0);
  return {.form = GemmForm::nt,
          .compute = t.dtype,
          .M = M,
          .N = r,
          .K = loraA.dim(1),
          .a = x,
          .b = elementsOf(loraA),
          .out = {.c = t.data<void>(), .dtype = t.dtype, .stride = r}};
}

/// scale * t B^T
GemmExtra upExtra(const Tensor& t, const Tensor& loraB, float scale) {
  return {.a = elementsOf(t), .b = elementsOf(loraB, scale), .K = loraB.dim(1)};
}

struct Plus {
  QLORA_DEVICE float operator()(int64_t, float x, float y) const { return x + y; }
};

/// y += x
void addTo(Context& context, const Tensor& x, const Tensor& y) {
  dispatchFloat(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    map(context, y.size(), Plus{}, y.data<T>(), x.data<const T>(), y.data<const T>());
  });
}

/// Whether the product itself adds the residual. Large products do nothing but store.
bool addsOnStoring(const Projections& a, const Projection& p) {
  return p.residual.defined() && p.weight.data.dtype != DType::i8 && leading(a.x) <= kFewRows;
}

}  // namespace

void loraLinearForward(Context& context, const LoraLinearForward& a) {
  const Elements x = dropped(context, a.x, {a.dropout, a.seed, a.stream});
  gemm(context, downGemm(a.loraA, x, leading(a.x), a.t));
  linearForward(context, a.x, a.weight, a.bias, a.y, upExtra(a.t, a.loraB, a.scale));
}

void loraLinearBackward(Context& context, const LoraLinearBackward& a) {
  const int64_t M = leading(a.x), N = a.weight.N, K = a.weight.K, r = a.loraA.dim(0);
  const DType compute = a.x.dtype;
  const DropoutMask dropout{a.dropout, a.seed, a.stream};
  // Of the compute type, since every product that reads it rounds it to that.
  const Elements u{
      .data = context.scratch.bytes(static_cast<size_t>(M * r) * sizeOf(compute)), .dtype = compute, .stride = r};
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

void projections(Context& context, const Projections& a) {
  const int64_t M = leading(a.x);
  static_assert(Projections::kMost <= kMostTogether);
  Gemm thin[kMostTogether]{}, whole[kMostTogether]{};
  int thins = 0, wholes = 0;
  for (int i = 0; i < a.count; ++i) {
    const Projection& p = a.layers[i];
    if (p.loraA.defined()) thin[thins++] = downGemm(p.loraA, elementsOf(a.x), M, p.t);
  }
  gemms(context, thin, thins);
  for (int i = 0; i < a.count; ++i) {
    const Projection& p = a.layers[i];
    const GemmExtra extra = p.loraA.defined() ? upExtra(p.t, p.loraB, p.scale) : GemmExtra{};
    if (p.weight.data.dtype == DType::i8) {
      Scratch scratch = context.scratch.nested();
      Context own{context.pool, scratch, context.queue, context.device};
      linearForward(own, a.x, p.weight, p.bias, p.y, extra);
    } else {
      whole[wholes++] = linearGemm(a.x, p.weight, p.bias, p.y, extra);
      if (addsOnStoring(a, p)) whole[wholes - 1].out.residual = p.residual.data<void>();
    }
  }
  gemms(context, whole, wholes);
  for (int i = 0; i < a.count; ++i) {
    const Projection& p = a.layers[i];
    if (p.residual.defined() && !addsOnStoring(a, p)) addTo(context, p.residual, p.y);
  }
}

}  // namespace qlora::cuda
