#include "simd/gemm.h"

#include "simd/gemm_fp32.h"

namespace qlora::QLORA_ISA {

void gemm(Context& context, const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
  Engine<Fp32Engine>::run(context, g);
}

PackedA packA(Context& context, GemmForm form, DType compute, const GemmOperand& a, int64_t M, int64_t K) {
  return Engine<Fp32Engine>::pack(context, form, compute, a, M, K);
}

}  // namespace qlora::QLORA_ISA
