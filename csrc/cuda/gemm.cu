#include "cuda/gemm.h"

namespace qlora::cuda {

void gemm(Context& context, const Gemm& g) { gemmPlain(context, g); }

}  // namespace qlora::cuda
