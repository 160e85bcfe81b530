#include "simd/gemm.h"

#include "simd/gemm_few_fp32.h"
#if QLORA_ISA_avx512bf16
#include "simd/gemm_few_back_bf16.h"
#include "simd/gemm_few_bf16.h"
#include "simd/gemm_thin_bf16.h"
#elif QLORA_ISA_neonbf16
#include "simd/gemm_bf16_neon.h"
#endif
#if QLORA_ISA_amx
#include "simd/gemm_amx.h"
#endif

namespace qlora::QLORA_ISA {

#if QLORA_ISA_amx
namespace {

using PairEngine = AmxEngine;

// Dot products read W once, and no faster would tiles.
constexpr int64_t kFewPairs = 4;

void gemmBf16(Context& context, const Gemm& g) {
  if (g.M <= kFewPairs && FewTokens::takes(g)) return FewTokens::run(context, g);
  if (FewTokensBack::takes(g)) return FewTokensBack::run(context, g);
  Engine<AmxEngine>::run(context, g);
}

}  // namespace
#elif QLORA_ISA_avx512bf16
namespace {

using PairEngine = Bf16Engine;

constexpr int64_t kFewPairs = FewTokens::kMost;

/// Rows [begin, begin + count) of A and C.
Gemm rowsOf(const Gemm& g, int64_t begin, int64_t count) {
  Gemm part = g;
  const auto from = [begin](const GemmOperand& a) {
    GemmOperand moved = a;
    moved.data = static_cast<const char*>(a.data) + begin * a.stride * static_cast<int64_t>(sizeOf(a.dtype));
    return moved;
  };
  if (g.K > 0) part.a = from(g.a);
  if (g.extra.K > 0) part.extra.a = from(g.extra.a);
  part.M = count;
  part.c = static_cast<char*>(g.c) + begin * g.cStride * static_cast<int64_t>(sizeOf(g.cDtype));
  if (g.rowScale) part.rowScale = g.rowScale + begin;
  if (begin > 0) part.packed = nullptr;
  return part;
}

void gemmBf16(Context& context, const Gemm& g) {
  if (FewTokens::takes(g)) return FewTokens::run(context, g);
  if (FewTokensBack::takes(g)) return FewTokensBack::run(context, g);
  if (ThinProducts::takes(g)) return ThinProducts::run(context, g);
  // The last tokens would pay for a whole strip.
  const int64_t tail = g.form == GemmForm::nt ? g.M % Bf16Engine::kStrip : 0;
  if (g.M > tail && tail > 0 && tail <= FewTokens::kMost) {
    const Gemm last = rowsOf(g, g.M - tail, tail);
    if (FewTokens::takes(last)) {
      Engine<Bf16Engine>::run(context, rowsOf(g, 0, g.M - tail));
      return FewTokens::run(context, last);
    }
  }
  Engine<Bf16Engine>::run(context, g);
}

}  // namespace
#elif QLORA_ISA_neonbf16
using PairEngine = Bf16Engine;

constexpr int64_t kFewPairs = FewTokensFp32::kMost;
#endif

void gemm(Context& context, const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
#if QLORA_ISA_avx512bf16
  if (g.compute == DType::bf16) return gemmBf16(context, g);
#elif QLORA_ISA_neonbf16
  if (g.compute == DType::bf16 && !FewTokensFp32::takes(g)) return Engine<Bf16Engine>::run(context, g);
#endif
  if (FewTokensFp32::takes(g)) return FewTokensFp32::run(context, g);
  Engine<Fp32Engine>::run(context, g);
}

bool takesPacked(GemmForm form, DType compute, int64_t M) {
  if (form != GemmForm::nt) return true;
#if QLORA_ISA_avx512bf16 || QLORA_ISA_neonbf16
  if (compute == DType::bf16) return M > kFewPairs;
#endif
  static_cast<void>(compute);
  return M > FewTokensFp32::kMost;
}

PackedA packA(Context& context, GemmForm form, DType compute, const GemmOperand& a, int64_t M, int64_t K) {
#if QLORA_ISA_avx512bf16 || QLORA_ISA_neonbf16
  if (compute == DType::bf16) return Engine<PairEngine>::pack(context, form, compute, a, M, K, true);
#endif
  return Engine<Fp32Engine>::pack(context, form, compute, a, M, K, true);
}

PackedA gemmThatPacks(Context& context, const Gemm& g) {
#if QLORA_ISA_avx512bf16 && !QLORA_ISA_amx
  if (g.compute == DType::bf16 && ThinProducts::packs(g)) return ThinProducts::runThatPacks(context, g);
#endif
  gemm(context, g);
  return packA(context, GemmForm::nn, g.compute, g.a, g.K, g.M);
}

}  // namespace qlora::QLORA_ISA
