// What a truncated singular value decomposition of a large matrix is made of, beside products: randomized subspace
// iteration (Halko, Martinsson and Tropp, 2011), for PiSSA (Meng et al., 2024).
//
//   orthonormalizeRows   y: rows that span what those of x [L, K] do, each of length 1 and at right angles to the
//   others.
//                        A row that lies in the span of those before it becomes 0. Gram-Schmidt, each row twice; sums
//                        in fp64.
//   singularFactors      of gram [L, L] = Y^T Y = P S^2 P^T, S falling: left[i] = p_i S_i^(-1/2) / sqrt(scale) and
//                        right[i] = p_i S_i^(1/2) / sqrt(scale), i < R, so that for V with orthonormal rows
//                        scale * (Y left^T) (right V) is the best approximation of Y V of rank R. Rows beyond L, and of
//                        S_i below 1e-6 of the largest, are 0. Jacobi's rotations, in fp64.
//
// All f32.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct OrthonormalizeRows {
  Tensor x, y;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.out(y);
  }
  void check() const {
    checkDType("orthonormalizeRows", "x", x, {DType::f32});
    checkShape("orthonormalizeRows", "x", x, {-1, -1});
    checkDType("orthonormalizeRows", "y", y, {DType::f32});
    checkSameShape("orthonormalizeRows", "y", y, x);
  }
};

struct SingularFactors {
  Tensor gram, left, right;
  float scale;

  template <class V>
  void visit(V& v) {
    v.in(gram);
    v.out(left);
    v.out(right);
    v.value(scale);
  }
  void check() const {
    checkDType("singularFactors", "gram", gram, {DType::f32});
    checkShape("singularFactors", "gram", gram, {-1, -1});
    checkShape("singularFactors", "gram", gram, {gram.dim(0), gram.dim(0)});
    checkDType("singularFactors", "left", left, {DType::f32});
    checkShape("singularFactors", "left", left, {-1, gram.dim(0)});
    checkDType("singularFactors", "right", right, {DType::f32});
    checkSameShape("singularFactors", "right", right, left);
    checkThat(scale > 0, "singularFactors", "scale must be above 0");
  }
};

}  // namespace qlora
