// Some rows of a matrix, and their gradient's way back.
//
//   select    y[i]  = x[rows[i]]
//   scatter   dx[m] = dy[i] where m = rows[i], else 0
//
// x, dx [M, C] and y, dy [R, C] of one floating-point type; rows i32 [R], ascending, each in [0, M): another fails with
// ERR_QLORA_ARGUMENT.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

inline void checkSelection(const char* op, const Tensor& all, const Tensor& rows, const Tensor& selected) {
  checkFloat(op, "all rows", all);
  checkShape(op, "all rows", all, {-1, -1});
  checkDType(op, "rows", rows, {DType::i32});
  checkShape(op, "rows", rows, {-1});
  checkDType(op, "selected rows", selected, {all.dtype});
  checkShape(op, "selected rows", selected, {rows.dim(0), all.dim(1)});
}

}  // namespace detail

struct SelectRows {
  Tensor x, rows, y;

  template <class V>
  void visit(V& v) {
    v.in(x);
    v.in(rows);
    v.out(y);
  }
  void check() const { detail::checkSelection("selectRows", x, rows, y); }
};

struct ScatterRows {
  Tensor dy, rows, dx;

  template <class V>
  void visit(V& v) {
    v.in(dy);
    v.in(rows);
    v.out(dx);
  }
  void check() const { detail::checkSelection("scatterRows", dx, rows, dy); }
};

}  // namespace qlora
