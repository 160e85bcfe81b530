// The rules of optimizers (ops/optimizer.h says them), as what becomes of one element: rule(p, g, state...) changes p
// and state. A rule's scalars are computed in fp64 from its settings and the number t of the step, and rounded once.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/dtype.h"

namespace qlora {

/// What unscales and clips every gradient. 1 leaves its bits as they are.
QLORA_SHARED float gradientFactor(float norm, float lossScale, double maxNorm) {
  const double scale = static_cast<double>(lossScale), unscaled = static_cast<double>(norm) / scale;
  const double clip = maxNorm == 0 ? 1.0 : std::min(1.0, maxNorm / (unscaled + 1e-6));
  return static_cast<float>(clip / scale);
}

struct AdamWRule {
  struct Settings {
    double lr, weightDecay, beta1, beta2, eps;
  };
  float beta1, rest1, beta2, rest2, decay, rate, eps;

  QLORA_SHARED AdamWRule(const Settings& s, double t)
      : beta1(static_cast<float>(s.beta1)),
        rest1(static_cast<float>(1 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        rest2(static_cast<float>(1 - s.beta2)),
        decay(static_cast<float>(1 - s.lr * s.weightDecay)) {
    const double c1 = 1 - std::pow(s.beta1, t), c2 = std::sqrt(1 - std::pow(s.beta2, t));
    rate = static_cast<float>(s.lr * c2 / c1);
    eps = static_cast<float>(s.eps * c2);
  }
  QLORA_SHARED void operator()(float& p, float g, float& m, float& v) const {
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * (g * g);
    p = p * decay - rate * (m / (std::sqrt(v) + eps));
  }
};

struct LionRule {
  struct Settings {
    double lr, weightDecay, beta1, beta2;
  };
  float beta1, rest1, beta2, rest2, decay, rate;

  QLORA_SHARED LionRule(const Settings& s, double)
      : beta1(static_cast<float>(s.beta1)),
        rest1(static_cast<float>(1 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        rest2(static_cast<float>(1 - s.beta2)),
        decay(static_cast<float>(1 - s.lr * s.weightDecay)),
        rate(static_cast<float>(s.lr)) {}
  QLORA_SHARED void operator()(float& p, float g, float& m) const {
    const float direction = beta1 * m + rest1 * g;
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
    p = p * decay - rate * sign;
    m = beta2 * m + rest2 * g;
  }
};

struct AdEMAMixRule {
  struct Settings {
    double lr, weightDecay, beta1, beta2, eps, beta3, alpha, horizon;
  };
  float beta1, rest1, beta2, rest2, beta3, rest3, decay, rate, c1, c2, alpha, eps;

  QLORA_SHARED AdEMAMixRule(const Settings& s, double t)
      : beta1(static_cast<float>(s.beta1)),
        rest1(static_cast<float>(1 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        rest2(static_cast<float>(1 - s.beta2)),
        decay(static_cast<float>(1 - s.lr * s.weightDecay)),
        rate(static_cast<float>(s.lr)),
        c1(static_cast<float>(1 - std::pow(s.beta1, t))),
        c2(static_cast<float>(std::sqrt(1 - std::pow(s.beta2, t)))),
        eps(static_cast<float>(s.eps)) {
    const double done = s.horizon > 0 ? t / s.horizon : 1.0;
    double b3 = s.beta3;
    if (s.horizon > 0) {
      b3 = std::min(std::exp(1 / ((1 - done) / std::log(s.beta1) + done / std::log(s.beta3))), s.beta3);
    }
    beta3 = static_cast<float>(b3);
    rest3 = static_cast<float>(1 - b3);
    alpha = static_cast<float>(std::min(done * s.alpha, s.alpha));
  }
  QLORA_SHARED void operator()(float& p, float g, float& m, float& m2, float& v) const {
    m = beta1 * m + rest1 * g;
    m2 = beta3 * m2 + rest3 * g;
    v = beta2 * v + rest2 * (g * g);
    p = p * decay - rate * ((m / c1 + alpha * m2) / (std::sqrt(v) / c2 + eps));
  }
};

struct SgdRule {
  struct Settings {
    double lr, weightDecay, momentum;
  };
  float rate, momentum, decay;

  /// At the first step m is the gradient, whatever it held.
  QLORA_SHARED SgdRule(const Settings& s, double t)
      : rate(static_cast<float>(s.lr)),
        momentum(static_cast<float>(t == 1 ? 0.0 : s.momentum)),
        decay(static_cast<float>(s.weightDecay)) {}
  QLORA_SHARED void operator()(float& p, float g) const { p = p - rate * decayed(p, g); }
  QLORA_SHARED void operator()(float& p, float g, float& m) const {
    const float d = decayed(p, g);
    m = momentum == 0.0f ? d : momentum * m + d;
    p = p - rate * m;
  }

 private:
  QLORA_SHARED float decayed(float p, float g) const { return decay == 0.0f ? g : g + decay * p; }
};

}  // namespace qlora
