// Attention of few queries, as when generating: keys and values are read once, for all query heads of their group.
#pragma once

#include "core/stream.h"
#include "ops/attention.h"

namespace qlora::QLORA_ISA::attention {

/// Up to so many queries a head come here.
constexpr int64_t kDecodeQueries = 4;

void decode(Context& context, const AttentionForward& a);

}  // namespace qlora::QLORA_ISA::attention
