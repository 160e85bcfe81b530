// The table of operations that a device offers: one line an op. The CPU fills one such table an instruction set
// (cpu_table.cpp, compiled once for each); CUDA's plugin exports its own.
#pragma once

#include "core/stream.h"
#include "ops/attention.h"
#include "ops/cast.h"
#include "ops/dequantize.h"
#include "ops/dora.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/glu.h"
#include "ops/grad_norm.h"
#include "ops/key_value_cache.h"
#include "ops/linear_cross_entropy.h"
#include "ops/logits_choose.h"
#include "ops/logits_process.h"
#include "ops/lora_linear.h"
#include "ops/low_rank.h"
#include "ops/matmul.h"
#include "ops/neftune.h"
#include "ops/optimizer.h"
#include "ops/quantize.h"
#include "ops/random_uniform.h"
#include "ops/rms_norm.h"
#include "ops/roofline.h"
#include "ops/rope.h"
#include "ops/select_rows.h"

// clang-format off
#define QLORA_OPS(X) \
  X(randomUniform, RandomUniform) \
  X(rmsNormForward, RmsNormForward) \
  X(rmsNormBackward, RmsNormBackward) \
  X(quantize4bit, Quantize4bit) \
  X(doubleQuantize, DoubleQuantize) \
  X(quantize8bit, Quantize8bit) \
  X(quantizeInt8, QuantizeInt8) \
  X(dequantize, Dequantize) \
  X(dequantize8bit, Dequantize8bit) \
  X(fourBitCode, FourBitCode) \
  X(dynamicMapCode, DynamicMapCode) \
  X(fill, Fill) \
  X(add, Add) \
  X(scale, Scale) \
  X(scaleByTensor, ScaleByTensor) \
  X(dropout, Dropout) \
  X(cast, Cast) \
  X(gluForward, GluForward) \
  X(gluBackward, GluBackward) \
  X(embeddingForward, EmbeddingForward) \
  X(embeddingBackward, EmbeddingBackward) \
  X(linearCrossEntropy, LinearCrossEntropy) \
  X(gradNorm, GradNorm) \
  X(adamw, AdamW) \
  X(adamw8bit, AdamW8bit) \
  X(lion, Lion) \
  X(lion8bit, Lion8bit) \
  X(ademamix, AdEMAMix) \
  X(sgd, Sgd) \
  X(logSoftmax, LogSoftmax) \
  X(constrainLogits, ConstrainLogits) \
  X(warpLogits, WarpLogits) \
  X(argmax, Argmax) \
  X(finishStep, FinishStep) \
  X(neftune, Neftune) \
  X(sample, Sample) \
  X(beamCandidates, BeamCandidates) \
  X(ropeTable, RopeTable) \
  X(rope, Rope) \
  X(ropeAppend, RopeAppend) \
  X(attentionForward, AttentionForward) \
  X(attentionBackward, AttentionBackward) \
  X(selectRows, SelectRows) \
  X(scatterRows, ScatterRows) \
  X(gatherKeyValue, GatherKeyValue) \
  X(matmulForward, MatmulForward) \
  X(matmulBackward, MatmulBackward) \
  X(matmulBackwardWeight, MatmulBackwardWeight) \
  X(loraLinearForward, LoraLinearForward) \
  X(loraLinearBackward, LoraLinearBackward) \
  X(projections, Projections) \
  X(loraRowNorm, LoraRowNorm) \
  X(doraScaleForward, DoraScaleForward) \
  X(doraScaleBackward, DoraScaleBackward) \
  X(orthonormalizeRows, OrthonormalizeRows) \
  X(singularFactors, SingularFactors) \
  X(roofline, Roofline) \
  /* the end */
// clang-format on

namespace qlora {

struct OpTable {
  const char* name;  // the instruction set or device it is for
#define QLORA_OP_POINTER(function, Args) void (*function)(Context&, const Args&);
  QLORA_OPS(QLORA_OP_POINTER)
#undef QLORA_OP_POINTER
};

/// The tables of this build that the processor at hand can run, best first; emulated ones last.
struct CpuTables {
  const OpTable* const* tables;
  int count;
};
CpuTables cpuTables();
/// The one of cpuChoice() (cpu_choice.h).
const OpTable& cpuTable();

}  // namespace qlora
