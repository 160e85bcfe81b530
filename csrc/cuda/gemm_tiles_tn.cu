#include "cuda/gemm_tiles.h"

namespace qlora::cuda {

// No weight is an operand of this form.
void tilesTn(Context& context, const Gemm& g, const TileSplit& split, int64_t parts) {
  if (g.compute == DType::bf16) {
    launchTiles<bf16, GemmForm::tn, false>(context, g, split, parts);
  } else {
    launchTiles<f16, GemmForm::tn, false>(context, g, split, parts);
  }
}

}  // namespace qlora::cuda
