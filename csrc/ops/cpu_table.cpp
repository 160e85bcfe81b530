// Compiled once an instruction set, as every file of kernels: QLORA_ISA is its name and its namespace.
#include "ops/op_table.h"

#define QLORA_STRING_(x) #x
#define QLORA_STRING(x) QLORA_STRING_(x)

namespace qlora::QLORA_ISA {

#define QLORA_OP_DECLARATION(function, Args) void function(Context&, const Args&);
QLORA_OPS(QLORA_OP_DECLARATION)
#undef QLORA_OP_DECLARATION

extern const OpTable opTable;
const OpTable opTable = {
    QLORA_STRING(QLORA_ISA),
#define QLORA_OP_ENTRY(function, Args) function,
    QLORA_OPS(QLORA_OP_ENTRY)
#undef QLORA_OP_ENTRY
};

}  // namespace qlora::QLORA_ISA
