// Optimizer steps over lists of parameters. Scalars of a rule are computed in fp64 and rounded once; every product and
// sum of an element is rounded by itself, as formats.md ("Optimizer state") writes them.
//
// Before every rule: where norm[1] is 0 (a gradient is not finite) nothing changes; else gradients are unscaled, and
// clipped as PyTorch does where maxNorm > 0:
//   g *= min(1, maxNorm / (n + 1e-6)) / lossScale[0],  n = norm[0] / lossScale[0];  norm is gradNorm's result
// t = counters[0] + 1: skipped steps do not count.
//
//   adamw     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2          (Loshchilov and Hutter, 2019)
//             p *= 1 - lr weightDecay
//             p -= lr (c2 / c1) m / (sqrt(v) + eps c2),  c1 = 1 - beta1^t, c2 = sqrt(1 - beta2^t)
//   lion      p *= 1 - lr weightDecay;  p -= lr sign(beta1 m + (1 - beta1) g)       (Chen et al., 2023)
//             m = beta2 m + (1 - beta2) g
//   ademamix  m, v as adamw's;  m2 = beta3' m2 + (1 - beta3') g                     (Pagliardini et al., 2024)
//             p *= 1 - lr weightDecay;  p -= lr (m / c1 + alpha' m2) / (sqrt(v) / c2 + eps)
//             where horizon T > 0 alpha' = min(alpha t / T, alpha) and beta3' = min(exp(1 / ((1 - t/T) / ln beta1 +
//             (t/T) / ln beta3)), beta3): both rise to their values in T steps; else they are these from the start
//   sgd       g += weightDecay p;  m = g at t = 1, then momentum m + g;  p -= lr m            (PyTorch's)
//
// params, grads and each list of state are parallel lists of equal sizes; params and grads f32; grads are not changed.
// State is f32, or in 8 bits (adamw8bit, lion8bit): u8 indices of a dynamic map (core/codes.h), m's signed and v's
// unsigned, with f32 absmax [ceil(n / 256)] a block of 256; it is dequantized, updated, used in fp32 for p, and
// quantized (simd/dynamic_state.h). All state of a call is in memory, or all of it in one file (core/page_file.h).
// sgd's state may be an empty list where momentum is 0.
//
// norm f32 [2]; counters i32 [2] and lossScale f32 [1] are finishStep's; applied f32 [1] becomes 1, or 0 where nothing
// changed.
#pragma once

#include <string>
#include <vector>

#include "core/check.h"
#include "core/codes.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "simd/optimizer_rules.h"

namespace qlora {

/// What every rule takes.
struct OptimizerStep {
  std::vector<Tensor> params, grads;
  Tensor norm, counters, lossScale, applied;
  double lr, weightDecay, maxNorm;

  template <class V>
  void visit(V& visitor) {
    visitor.update(params);
    visitor.in(grads);
    visitor.in(norm);
    visitor.in(counters);
    visitor.in(lossScale);
    visitor.out(applied);
    visitor.value(lr);
    visitor.value(weightDecay);
    visitor.value(maxNorm);
  }
  void check(const char* op) const {
    for (const Tensor& p : params) checkDType(op, "params", p, {DType::f32});
    checkState(op, "grads", grads);
    checkDType(op, "norm", norm, {DType::f32});
    checkShape(op, "norm", norm, {2});
    checkDType(op, "counters", counters, {DType::i32});
    checkShape(op, "counters", counters, {2});
    checkDType(op, "lossScale", lossScale, {DType::f32});
    checkShape(op, "lossScale", lossScale, {1});
    checkDType(op, "applied", applied, {DType::f32});
    checkShape(op, "applied", applied, {1});
    checkThat(maxNorm >= 0, op, "maxNorm must not be negative");
  }
  /// f32 beside each parameter.
  void checkState(const char* op, const char* argument, const std::vector<Tensor>& list) const {
    checkCount(op, argument, list);
    for (size_t i = 0; i < list.size(); ++i) {
      checkDType(op, argument, list[i], {DType::f32});
      checkSameShape(op, argument, list[i], params[i]);
    }
  }
  /// 8 bits beside each parameter.
  void checkState(const char* op, const char* argument, const std::vector<Tensor>& index,
                  const std::vector<Tensor>& absmax) const {
    checkCount(op, argument, index);
    checkCount(op, argument, absmax);
    for (size_t i = 0; i < index.size(); ++i) {
      checkDType(op, argument, index[i], {DType::u8});
      checkSameShape(op, argument, index[i], params[i]);
      checkDType(op, argument, absmax[i], {DType::f32});
      checkShape(op, argument, absmax[i], {(params[i].size() + 255) / 256});
    }
  }
  /// All in memory or all in one file: a kernel looks at the first only.
  void checkPlace(const char* op, std::initializer_list<const std::vector<Tensor>*> lists) const {
    for (const auto* list : lists) {
      for (const Tensor& t : *list) {
        checkThat(t.storage->pages == (*lists.begin())->front().storage->pages, op,
                  "all state must be in memory, or all of it in one file");
      }
    }
  }

 private:
  void checkCount(const char* op, const char* argument, const std::vector<Tensor>& list) const {
    if (list.size() == params.size()) return;
    fail("ERR_QLORA_ARGUMENT", "%s: %s must list %zu tensors, as params does, got %zu", op, argument, params.size(),
         list.size());
  }
};

inline void checkBetas(const char* op, double beta1, double beta2) {
  checkThat(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, op, "beta1 and beta2 must be in [0, 1)");
}

struct AdamOptions {
  double beta1, beta2, eps;

  template <class V>
  void visit(V& visitor) {
    visitor.value(beta1);
    visitor.value(beta2);
    visitor.value(eps);
  }
  void check(const char* op) const { checkBetas(op, beta1, beta2); }
};

struct AdamW {
  OptimizerStep step;
  std::vector<Tensor> m, v;
  AdamOptions options;

  template <class V>
  void visit(V& visitor) {
    step.visit(visitor);
    visitor.state(m);
    visitor.state(v);
    options.visit(visitor);
  }
  AdamWRule::Settings settings() const {
    return {step.lr, step.weightDecay, options.beta1, options.beta2, options.eps};
  }
  void check() const {
    step.check("adamw");
    step.checkState("adamw", "m", m);
    step.checkState("adamw", "v", v);
    step.checkPlace("adamw", {&m, &v});
    options.check("adamw");
  }
};

struct AdamW8bit {
  OptimizerStep step;
  std::vector<Tensor> mIndex, mAbsmax, vIndex, vAbsmax;
  AdamOptions options;

  template <class V>
  void visit(V& visitor) {
    step.visit(visitor);
    visitor.state(mIndex);
    visitor.state(mAbsmax);
    visitor.state(vIndex);
    visitor.state(vAbsmax);
    options.visit(visitor);
  }
  AdamWRule::Settings settings() const {
    return {step.lr, step.weightDecay, options.beta1, options.beta2, options.eps};
  }
  void check() const {
    step.check("adamw8bit");
    step.checkState("adamw8bit", "m", mIndex, mAbsmax);
    step.checkState("adamw8bit", "v", vIndex, vAbsmax);
    step.checkPlace("adamw8bit", {&mIndex, &mAbsmax, &vIndex, &vAbsmax});
    options.check("adamw8bit");
  }
};

struct Lion {
  OptimizerStep step;
  std::vector<Tensor> m;
  double beta1, beta2;

  template <class V>
  void visit(V& visitor) {
    step.visit(visitor);
    visitor.state(m);
    visitor.value(beta1);
    visitor.value(beta2);
  }
  LionRule::Settings settings() const { return {step.lr, step.weightDecay, beta1, beta2}; }
  void check() const {
    step.check("lion");
    step.checkState("lion", "m", m);
    step.checkPlace("lion", {&m});
    checkBetas("lion", beta1, beta2);
  }
};

struct Lion8bit {
  OptimizerStep step;
  std::vector<Tensor> mIndex, mAbsmax;
  double beta1, beta2;

  template <class V>
  void visit(V& visitor) {
    step.visit(visitor);
    visitor.state(mIndex);
    visitor.state(mAbsmax);
    visitor.value(beta1);
    visitor.value(beta2);
  }
  LionRule::Settings settings() const { return {step.lr, step.weightDecay, beta1, beta2}; }
  void check() const {
    step.check("lion8bit");
    step.checkState("lion8bit", "m", mIndex, mAbsmax);
    step.checkPlace("lion8bit", {&mIndex, &mAbsmax});
    checkBetas("lion8bit", beta1, beta2);
  }
};

struct AdEMAMix {
  OptimizerStep step;
  std::vector<Tensor> m, m2, v;
  AdamOptions options;
  double beta3, alpha, horizon;

  template <class V>
  void visit(V& visitor) {
    step.visit(visitor);
    visitor.state(m);
    visitor.state(m2);
    visitor.state(v);
    options.visit(visitor);
    visitor.value(beta3);
    visitor.value(alpha);
    visitor.value(horizon);
  }
  AdEMAMixRule::Settings settings() const {
    return {step.lr, step.weightDecay, options.beta1, options.beta2, options.eps, beta3, alpha, horizon};
  }
  void check() const {
    step.check("ademamix");
    step.checkState("ademamix", "m", m);
    step.checkState("ademamix", "m2", m2);
    step.checkState("ademamix", "v", v);
    step.checkPlace("ademamix", {&m, &m2, &v});
    options.check("ademamix");
    checkThat(beta3 >= 0 && beta3 < 1, "ademamix", "beta3 must be in [0, 1)");
    checkThat(horizon >= 0, "ademamix", "horizon must not be negative");
  }
};

struct Sgd {
  OptimizerStep step;
  std::vector<Tensor> m;
  double momentum;

  template <class V>
  void visit(V& visitor) {
    step.visit(visitor);
    visitor.state(m);
    visitor.value(momentum);
  }
  SgdRule::Settings settings() const { return {step.lr, step.weightDecay, momentum}; }
  void check() const {
    step.check("sgd");
    if (momentum != 0 || !m.empty()) step.checkState("sgd", "m", m);
    step.checkPlace("sgd", {&m});
  }
};

/// The end of a step, once all of its calls have run: counts it, and adjusts the scale of f16's loss as PyTorch's
/// GradScaler does.
///
///   result = [norm[0] / lossScale[0], 1 where the step was applied, lossScale[0]]
///   counters[0] counts applied steps; counters[1] those since the scale last changed
///   growthInterval > 0: the scale doubles after so many, and halves, to no less than 1, where a step was skipped
///
/// norm f32 [2]; applied: a list of f32 [1], what the step's calls said; counters i32 [2]; lossScale f32 [1], a power
/// of two; result f32 [3]. Where a call failed, nothing changes, and result fails with it.
struct FinishStep {
  Tensor norm;
  std::vector<Tensor> applied;
  Tensor counters, lossScale, result;
  int64_t growthInterval;

  template <class V>
  void visit(V& visitor) {
    visitor.in(norm);
    visitor.in(applied);
    visitor.update(counters);
    visitor.update(lossScale);
    visitor.out(result);
    visitor.value(growthInterval);
  }
  void check() const {
    const char* op = "finishStep";
    checkDType(op, "norm", norm, {DType::f32});
    checkShape(op, "norm", norm, {2});
    for (const Tensor& a : applied) checkDType(op, "applied", a, {DType::f32});
    checkDType(op, "counters", counters, {DType::i32});
    checkShape(op, "counters", counters, {2});
    checkDType(op, "lossScale", lossScale, {DType::f32});
    checkShape(op, "lossScale", lossScale, {1});
    checkDType(op, "result", result, {DType::f32});
    checkShape(op, "result", result, {3});
    checkThat(growthInterval >= 0, op, "growthInterval must not be negative");
  }
};

}  // namespace qlora
