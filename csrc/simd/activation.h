// Activations with their derivatives, branch-free so that loops over them vectorize. x is the input, s its gate:
//
//   silu       x s, s = 1 / (1 + e^-x)
//   gelu tanh  x s, s = (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
//   gelu erf   x Phi(x), Phi the normal distribution function
//   relu       max(x, 0)
//
// Sources: Hendrycks and Gimpel, "Gaussian error linear units", 2016; Elfwing et al., 2017, for silu.
#pragma once

#include "simd/lanes.h"

namespace qlora {

enum class Activation : int { silu, geluTanh, geluErf, relu };
constexpr int kActivations = 4;

struct ValueAndSlope {
  float value, slope;  // f(x), f'(x)
};

/// tanh(x) to within 2e-7 of itself. Near 0 a Taylor series, since 1 - 2 / (1 + e^2x) cancels there.
QLORA_SHARED float fastTanh(float x) {
  const float square = x * x;
  float series = 0.021869488f;
  series = series * square - 0.053968254f;
  series = series * square + 0.13333334f;
  series = series * square - 0.33333334f;
  series = x + x * square * series;
  const float direct = 1.0f - 2.0f / (1.0f + fastExp(2.0f * x));
  return square < 0.0625f ? series : direct;
}

QLORA_SHARED ValueAndSlope silu(float x) {
  const float s = 1.0f / (1.0f + fastExp(-x));
  return {x * s, s * (1.0f + x * (1.0f - s))};
}

QLORA_SHARED ValueAndSlope geluTanh(float x) {
  constexpr float kRoot = 0.79788456f;  // sqrt(2 / pi)
  const float square = x * x;
  const float s = 1.0f / (1.0f + fastExp(-2.0f * kRoot * x * (1.0f + 0.044715f * square)));
  const float ds = s * (1.0f - s) * 2.0f * kRoot, du = 1.0f + 3.0f * 0.044715f * square;
  return {x * s, s + (ds == 0.0f ? 0.0f : x * ds * du)};  // du may be infinite where ds is 0
}

/// With phi the normal density: f' = Phi(x) + x phi(x). For x <= 0, Phi(x) = e^(-x^2 / 2) P(t), t = 1 / (1 + 0.3 |x|);
/// P is a least-maximum fit of the relative error on |x| <= 14 (6e-8).
QLORA_SHARED ValueAndSlope geluErf(float x) {
  const float t = 1.0f / (1.0f + 0.3f * __builtin_fabsf(x));
  float p = 3.837828957e-02f;
  p = p * t - 1.691661116e-01f;
  p = p * t + 2.286600811e-01f;
  p = p * t - 7.650647756e-02f;
  p = p * t + 1.425355245e-01f;
  p = p * t + 9.468352292e-02f;
  p = p * t + 1.219203422e-01f;
  p = p * t + 1.194876889e-01f;
  p = p * t + 7.168876037e-06f;
  const float density = fastExp(-0.5f * x * x);
  const float tail = density * p;
  const float s = x > 0.0f ? 1.0f - tail : tail;
  return {x * s, s + x * density * 0.39894228f};
}

QLORA_SHARED ValueAndSlope relu(float x) { return {x > 0.0f ? x : (x != x ? x : 0.0f), x > 0.0f ? 1.0f : 0.0f}; }

template <Activation kind>
QLORA_SHARED ValueAndSlope activate(float x) {
  if constexpr (kind == Activation::silu) return silu(x);
  if constexpr (kind == Activation::geluTanh) return geluTanh(x);
  if constexpr (kind == Activation::geluErf) return geluErf(x);
  if constexpr (kind == Activation::relu) return relu(x);
}

template <Activation kind>
struct ActivationKind {
  static constexpr Activation value = kind;
};

/// Calls f with the kind as a type: dispatchActivation(a, [&](auto kind) { activate<kind.value>(x); }).
template <class F>
QLORA_INLINE void dispatchActivation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::silu:
      return f(ActivationKind<Activation::silu>{});
    case Activation::geluTanh:
      return f(ActivationKind<Activation::geluTanh>{});
    case Activation::geluErf:
      return f(ActivationKind<Activation::geluErf>{});
    case Activation::relu:
      return f(ActivationKind<Activation::relu>{});
  }
}

}  // namespace qlora
