#include "ops/select_rows.h"

#include <algorithm>
#include <cstring>

namespace qlora::QLORA_ISA {

namespace {

constexpr int64_t kRowsPerTask = 32;

void checkRows(const Tensor& rows, int64_t M) {
  const int32_t* row = rows.data<int32_t>();
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (row[i] < 0 || row[i] >= M || (i > 0 && row[i] <= row[i - 1])) {
      fail("ERR_QLORA_ARGUMENT", "selectRows: rows must ascend from 0 to at most %lld, got %d at %lld",
           static_cast<long long>(M - 1), row[i], static_cast<long long>(i));
    }
  }
}

int64_t bytesOfRow(const Tensor& t) { return t.dim(1) * static_cast<int64_t>(sizeOf(t.dtype)); }

}  // namespace

void selectRows(Context& context, const SelectRows& a) {
  checkRows(a.rows, a.x.dim(0));
  const int64_t R = a.rows.size(), bytes = bytesOfRow(a.x);
  const int32_t* rows = a.rows.data<int32_t>();
  const char* x = a.x.data<char>();
  char* y = a.y.data<char>();
  context.pool.parallelFor((R + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t i = task * kRowsPerTask; i < std::min(R, (task + 1) * kRowsPerTask); ++i) {
      std::memcpy(y + i * bytes, x + rows[i] * bytes, static_cast<size_t>(bytes));
    }
  });
}

void scatterRows(Context& context, const ScatterRows& a) {
  const int64_t M = a.dx.dim(0), R = a.rows.size(), bytes = bytesOfRow(a.dx);
  checkRows(a.rows, M);
  const int32_t* rows = a.rows.data<int32_t>();
  const char* dy = a.dy.data<char>();
  char* dx = a.dx.data<char>();
  const auto zero = [&](int64_t begin, int64_t end) {
    std::memset(dx + begin * bytes, 0, static_cast<size_t>((end - begin) * bytes));
  };
  // Each row takes the gap before it along.
  context.pool.parallelFor((R + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t i = task * kRowsPerTask; i < std::min(R, (task + 1) * kRowsPerTask); ++i) {
      zero(i == 0 ? 0 : rows[i - 1] + 1, rows[i]);
      std::memcpy(dx + rows[i] * bytes, dy + i * bytes, static_cast<size_t>(bytes));
    }
  });
  zero(R == 0 ? 0 : rows[R - 1] + 1, M);
}

}  // namespace qlora::QLORA_ISA
