// The cache of keys or values that generation keeps a layer. ropeAppend (ops/rope.h) fills it.
//
//   gather   cache[b, t, h, d] = source[from[b], t, h, d]       for begin <= t < end; from[b] -1 leaves row b as it is
//
// cache [B, S, Hkv, D] and source [B', S', Hkv, D] of one floating-point type; source may be the cache itself: all its
// rows are read as they were before. from i32 [B]; one outside [-1, B') fails with ERR_QLORA_ARGUMENT. The rest of the
// cache stays as it is. Where the operation fails the cache fails with it: what reads it would compute with tokens that
// are not there.
#pragma once

#include "core/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

struct GatherKeyValue {
  Tensor source, from, cache;
  int64_t begin, end;

  template <class V>
  void visit(V& v) {
    v.in(source);
    v.in(from);
    v.accumulate(cache);
    v.value(begin);
    v.value(end);
  }
  void check() const {
    checkFloat("gatherKeyValue", "source", source);
    checkShape("gatherKeyValue", "source", source, {-1, -1, -1, -1});
    checkDType("gatherKeyValue", "cache", cache, {source.dtype});
    checkShape("gatherKeyValue", "cache", cache, {-1, -1, source.dim(2), source.dim(3)});
    checkDType("gatherKeyValue", "from", from, {DType::i32});
    checkShape("gatherKeyValue", "from", from, {cache.dim(0)});
    if (begin < 0 || begin > end || end > source.dim(1) || end > cache.dim(1)) {
      fail("ERR_QLORA_SHAPE", "gatherKeyValue: tokens %lld to %lld are not within caches of %lld and %lld",
           static_cast<long long>(begin), static_cast<long long>(end), static_cast<long long>(source.dim(1)),
           static_cast<long long>(cache.dim(1)));
    }
  }
};

}  // namespace qlora
