#include "simd/gemm.h"

#include "simd/gemm_fp32.h"
#if QLORA_ISA_avx512bf16
#include "simd/gemm_few_bf16.h"
#endif

namespace qlora::QLORA_ISA {

void gemm(Context& context, const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
#if QLORA_ISA_avx512bf16
  if (g.compute == DType::bf16) {
    if (FewTokens::takes(g)) return FewTokens::run(context, g);
    return Engine<Bf16Engine>::run(context, g);
  }
#endif
  Engine<Fp32Engine>::run(context, g);
}

PackedA packA(Context& context, GemmForm form, DType compute, const GemmOperand& a, int64_t M, int64_t K) {
#if QLORA_ISA_avx512bf16
  if (compute == DType::bf16) return Engine<Bf16Engine>::pack(context, form, compute, a, M, K);
#endif
  return Engine<Fp32Engine>::pack(context, form, compute, a, M, K);
}

}  // namespace qlora::QLORA_ISA
