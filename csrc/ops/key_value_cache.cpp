#include "ops/key_value_cache.h"

#include <cstring>

namespace qlora::QLORA_ISA {

void appendKeyValue(Context& context, const AppendKeyValue& a) {
  const int64_t token = a.rows.dim(2) * a.rows.dim(3) * static_cast<int64_t>(sizeOf(a.rows.dtype));
  const int64_t bytes = a.rows.dim(1) * token, cacheBytes = a.cache.dim(1) * token;
  const char* rows = a.rows.data<char>();
  char* cache = a.cache.data<char>() + a.at * token;
  context.pool.parallelFor(a.rows.dim(0),
                           [&](int64_t b, int) { std::memcpy(cache + b * cacheBytes, rows + b * bytes, bytes); });
}

}  // namespace qlora::QLORA_ISA
