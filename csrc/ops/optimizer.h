// Optimizer steps over lists of parameters, fp32 state. Scalars of a rule are computed in fp64 and rounded once; every
// product and sum of an element is rounded by itself, as formats.md ("Optimizer state") writes them.
//
// Before every rule: where norm[1] is 0 (a gradient is not finite) nothing changes; where maxNorm > 0,
//   g *= min(1, maxNorm / (norm[0] + 1e-6))            PyTorch's clipping; norm is gradNorm's result
//
//   adamw   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2            (Loshchilov and Hutter, 2019)
//           p *= 1 - lr weightDecay
//           p -= lr (c2 / c1) m / (sqrt(v) + eps c2),  c1 = 1 - beta1^step, c2 = sqrt(1 - beta2^step)
//   sgd     g += weightDecay p;  m = g at step 1, then momentum m + g;  p -= lr m            (PyTorch's)
//
// params, grads and each list of state are parallel lists of f32 tensors of equal sizes; grads are not changed; norm
// f32 [2]; step counts from 1. sgd's state may be an empty list where momentum is 0.
#pragma once

#include <vector>

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

inline void checkLikeParams(const char* op, const char* argument, const std::vector<Tensor>& list,
                            const std::vector<Tensor>& params) {
  if (list.size() != params.size()) {
    fail("ERR_QLORA_ARGUMENT", "%s: %s must list %zu tensors, as params does, got %zu", op, argument, params.size(),
         list.size());
  }
  for (size_t i = 0; i < list.size(); ++i) {
    checkDType(op, argument, list[i], {DType::f32});
    checkSameShape(op, argument, list[i], params[i]);
  }
}

inline void checkStep(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                      const Tensor& norm, int64_t step, double maxNorm) {
  for (const Tensor& p : params) checkDType(op, "params", p, {DType::f32});
  checkLikeParams(op, "grads", grads, params);
  checkDType(op, "norm", norm, {DType::f32});
  checkShape(op, "norm", norm, {2});
  checkThat(step >= 1, op, "step counts from 1");
  checkThat(maxNorm >= 0, op, "maxNorm must not be negative");
}

}  // namespace detail

struct AdamW {
  std::vector<Tensor> params, grads, m, v;
  Tensor norm;
  double lr, beta1, beta2, eps, weightDecay;
  int64_t step;
  double maxNorm;

  template <class V>
  void visit(V& visitor) {
    visitor.update(params);
    visitor.in(grads);
    visitor.update(m);
    visitor.update(v);
    visitor.in(norm);
    visitor.value(lr);
    visitor.value(beta1);
    visitor.value(beta2);
    visitor.value(eps);
    visitor.value(weightDecay);
    visitor.value(step);
    visitor.value(maxNorm);
  }
  void check() const {
    detail::checkStep("adamw", params, grads, norm, step, maxNorm);
    detail::checkLikeParams("adamw", "m", m, params);
    detail::checkLikeParams("adamw", "v", v, params);
    checkThat(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "adamw", "beta1 and beta2 must be in [0, 1)");
  }
};

struct Sgd {
  std::vector<Tensor> params, grads, m;
  Tensor norm;
  double lr, momentum, weightDecay;
  int64_t step;
  double maxNorm;

  template <class V>
  void visit(V& visitor) {
    visitor.update(params);
    visitor.in(grads);
    visitor.update(m);
    visitor.in(norm);
    visitor.value(lr);
    visitor.value(momentum);
    visitor.value(weightDecay);
    visitor.value(step);
    visitor.value(maxNorm);
  }
  void check() const {
    detail::checkStep("sgd", params, grads, norm, step, maxNorm);
    if (momentum != 0 || !m.empty()) detail::checkLikeParams("sgd", "m", m, params);
  }
};

}  // namespace qlora
