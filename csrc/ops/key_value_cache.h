// The cache of keys or values that generation keeps a layer, with room for tokens to come.
//
//   cache[b, at + t, h, d] = rows[b, t, h, d]
//
// rows [B, T, Hkv, D] and cache [B, S, Hkv, D] of one floating-point type; at + T <= S. The rest of the cache stays as
// it is.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct AppendKeyValue {
  Tensor rows, cache;
  int64_t at;

  template <class V>
  void visit(V& v) {
    v.in(rows);
    v.update(cache);
    v.value(at);
  }
  void check() const {
    checkFloat("appendKeyValue", "rows", rows);
    checkShape("appendKeyValue", "rows", rows, {-1, -1, -1, -1});
    checkDType("appendKeyValue", "cache", cache, {rows.dtype});
    checkShape("appendKeyValue", "cache", cache, {rows.dim(0), -1, rows.dim(2), rows.dim(3)});
    if (at < 0 || at + rows.dim(1) > cache.dim(1)) {
      fail("ERR_QLORA_SHAPE", "appendKeyValue: %lld rows at %lld do not fit into a cache of %lld",
           static_cast<long long>(rows.dim(1)), static_cast<long long>(at), static_cast<long long>(cache.dim(1)));
    }
  }
};

}  // namespace qlora
