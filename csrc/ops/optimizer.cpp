#include "ops/optimizer.h"

#include <algorithm>
#include <cmath>

#include "simd/tensor_list.h"

namespace qlora::QLORA_ISA {

namespace {

/// The factor of every gradient. 1 leaves its bits as they are.
float clipFactor(const float* norm, double maxNorm) {
  if (maxNorm == 0) return 1.0f;
  return static_cast<float>(std::min(1.0, maxNorm / (static_cast<double>(norm[0]) + 1e-6)));
}

/// What every optimizer shares: skipping, clipping, pieces. apply(piece, factor) does its rule to one piece.
template <class Apply>
void stepPieces(Context& context, const std::vector<Tensor>& params, const Tensor& norm, double maxNorm,
                Apply&& apply) {
  const float* n = norm.data<float>();
  if (n[1] == 0) return;
  const float factor = clipFactor(n, maxNorm);
  const Pieces pieces = cutIntoPieces(context, params);
  context.pool.parallelFor(pieces.count, [&](int64_t i, int) { apply(pieces.data[i], factor); });
}

float* at(const std::vector<Tensor>& list, const Piece& piece) {
  return list[piece.tensor].data<float>() + piece.begin;
}

// A rule is the arithmetic of one element: p and its state change in place, g is clipped already.

struct AdamWRule {
  float beta1, rest1, beta2, rest2, decay, rate, eps;

  explicit AdamWRule(const AdamW& a) {
    const double t = static_cast<double>(a.step);
    const double c1 = 1 - std::pow(a.beta1, t), c2 = std::sqrt(1 - std::pow(a.beta2, t));
    beta1 = static_cast<float>(a.beta1);
    rest1 = static_cast<float>(1 - a.beta1);
    beta2 = static_cast<float>(a.beta2);
    rest2 = static_cast<float>(1 - a.beta2);
    decay = static_cast<float>(1 - a.lr * a.weightDecay);
    rate = static_cast<float>(a.lr * c2 / c1);
    eps = static_cast<float>(a.eps * c2);
  }
  QLORA_INLINE void operator()(float& p, float g, float& m, float& v) const {
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * (g * g);
    p = p * decay - rate * (m / (std::sqrt(v) + eps));
  }
};

struct SgdRule {
  float rate, momentum, decay;

  /// At the first step m is the gradient, whatever it held.
  explicit SgdRule(const Sgd& a)
      : rate(static_cast<float>(a.lr)),
        momentum(static_cast<float>(a.step == 1 ? 0.0 : a.momentum)),
        decay(static_cast<float>(a.weightDecay)) {}
  QLORA_INLINE void operator()(float& p, float g) const { p = p - rate * decayed(p, g); }
  QLORA_INLINE void operator()(float& p, float g, float& m) const {
    const float d = decayed(p, g);
    m = momentum == 0.0f ? d : momentum * m + d;
    p = p - rate * m;
  }

 private:
  QLORA_INLINE float decayed(float p, float g) const { return decay == 0.0f ? g : g + decay * p; }
};

}  // namespace

void adamw(Context& context, const AdamW& a) {
  const AdamWRule rule(a);
  stepPieces(context, a.params, a.norm, a.maxNorm, [&](const Piece& piece, float factor) {
    float* __restrict p = at(a.params, piece);
    const float* __restrict g = at(a.grads, piece);
    float* __restrict m = at(a.m, piece);
    float* __restrict v = at(a.v, piece);
    for (int64_t i = 0; i < piece.count; ++i) rule(p[i], g[i] * factor, m[i], v[i]);
  });
}

void sgd(Context& context, const Sgd& a) {
  const SgdRule rule(a);
  stepPieces(context, a.params, a.norm, a.maxNorm, [&](const Piece& piece, float factor) {
    float* __restrict p = at(a.params, piece);
    const float* __restrict g = at(a.grads, piece);
    if (a.momentum == 0) {
      for (int64_t i = 0; i < piece.count; ++i) rule(p[i], g[i] * factor);
    } else {
      float* __restrict m = at(a.m, piece);
      for (int64_t i = 0; i < piece.count; ++i) rule(p[i], g[i] * factor, m[i]);
    }
  });
}

}  // namespace qlora::QLORA_ISA
