#include "cuda/gemm_tiles.h"

namespace qlora::cuda {

void tilesNn(Context& context, const Gemm& g, const TileSplit& split, int64_t parts) {
  const bool fourBit = g.b.dtype == DType::u8;
  if (g.compute == DType::bf16) {
    (fourBit ? launchTiles<bf16, GemmForm::nn, true> : launchTiles<bf16, GemmForm::nn, false>)(context, g, split, parts);
  } else {
    (fourBit ? launchTiles<f16, GemmForm::nn, true> : launchTiles<f16, GemmForm::nn, false>)(context, g, split, parts);
  }
}

}  // namespace qlora::cuda
