#include "cuda/rows.h"
#include "ops/select_rows.h"

namespace qlora::cuda {

namespace {

void checkRows(Context& context, const Tensor& rows, int64_t M) {
  if (!context.queue) return;  // a rehearsal has no numbers
  const std::vector<int32_t> row = hostValues(context, rows);
  for (size_t i = 0; i < row.size(); ++i) {
    if (row[i] < 0 || row[i] >= M || (i > 0 && row[i] <= row[i - 1])) {
      fail("ERR_QLORA_ARGUMENT", "selectRows: rows must ascend from 0 to at most %lld, got %d at %zu",
           static_cast<long long>(M - 1), row[i], i);
    }
  }
}

int64_t bytesOfRow(const Tensor& t) { return t.dim(1) * static_cast<int64_t>(sizeOf(t.dtype)); }

}  // namespace

void selectRows(Context& context, const SelectRows& a) {
  checkRows(context, a.rows, a.x.dim(0));
  copyRows(context, a.rows.size(), bytesOfRow(a.x), a.x.data<void>(), a.rows.data<int32_t>(), a.y.data<void>(),
           nullptr);
}

void scatterRows(Context& context, const ScatterRows& a) {
  checkRows(context, a.rows, a.dx.dim(0));
  setBytes(context, a.dx.data<void>(), 0, a.dx.storage->bytes);
  copyRows(context, a.rows.size(), bytesOfRow(a.dx), a.dy.data<void>(), nullptr, a.dx.data<void>(),
           a.rows.data<int32_t>());
}

}  // namespace qlora::cuda
