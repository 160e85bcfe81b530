// Matrix products for every operation of the CPU: one blocked algorithm, in which reading an operand (decoding 4 bits,
// converting 16) is the packing that such an algorithm does anyway.
//
//   nt:  C[M, N] = alpha * A[M, K] B[N, K]^T     forward of a linear layer (B the weight)
//   nn:  C[M, N] = alpha * A[M, K] B[K, N]       its backward to the input (B the weight)
//   tn:  C[M, N] = alpha * A[K, M]^T B[K, N]     its backward to the weight
//
// A second product may ride along in the same accumulators (`extra`: LoRA's, r more steps of K):
//   C = alpha * (A B + A2 B2) + bias,   or with dropout   C = alpha * (A B + mask . (A2 B2)) + bias
// and an A that several products share can be packed once (`packA`).
//
// Precision: operands are rounded to `compute` (a 4-bit weight through its scaled table, so both directions see the
// same W), products and sums are fp32. On AVX-512 with bf16, products of bf16 go through vdpbf16ps, on AMX through
// tdpbf16ps, on ARM with bf16 through bfmmla; there bf16 subnormals (below 1.2e-38) count as zero, and bfmmla may round
// the sums between its products to odd.
#pragma once

#include "core/stream.h"
#include "ops/weight.h"
#include "simd/dropout.h"

namespace qlora::QLORA_ISA {

enum class GemmForm { nt, nn, tn };
enum class GemmStore { overwrite, add };  // add: C += ...

/// A dense operand where it lies: element (i, j) at data[i * stride + j].
struct GemmOperand {
  const void* data;
  DType dtype;  // f32, bf16 or f16; i8: the integers themselves
  int64_t stride;
  const Weight* weight = nullptr;  // B only: a weight of any kind in place of the three above
  float scale = 1;                 // dense only: multiplies each element before it is rounded to the compute type
};

/// An operand A of `M` (nt, nn: rows; tn: columns), packed for one form and compute type.
struct PackedA {
  GemmForm form;
  DType compute;
  int64_t M, K;
  void* panels = nullptr;
  bool split = true;  // the order of K (rows.h); only nt has a choice
};

/// A product that is added in the same accumulators, of the same form, M and N.
struct GemmExtra {
  GemmOperand a, b;
  int64_t K = 0;          // 0: there is none
  DropoutMask dropout{};  // of its elements m * N + n
};

struct Gemm {
  GemmForm form;
  DType compute;  // operands are rounded to it; products are summed in fp32
  int64_t M, N, K;
  GemmOperand a, b;
  void* c;
  DType cDtype;
  int64_t cStride;
  float alpha = 1;
  GemmStore store = GemmStore::overwrite;
  const float* bias = nullptr;         // [N], added once
  const float* rowScale = nullptr;     // [M], multiplies what alpha multiplies
  const float* columnScale = nullptr;  // [N], likewise
  GemmExtra extra{};
  const PackedA* packed = nullptr;  // in place of a
};

/// Runs on the whole pool. The bits of the result do not depend on the number of threads.
void gemm(Context& context, const Gemm& g);

/// Whether products of M rows take a packed A. Few rows are read as they lie: packed they would fill a whole strip.
bool takesPacked(GemmForm form, DType compute, int64_t M);

/// Packs A once for several products. The panels live in the context's scratch.
PackedA packA(Context& context, GemmForm form, DType compute, const GemmOperand& a, int64_t M, int64_t K);

/// gemm() of form tn that also returns its A packed as the rows, [K, M], of products nn. Where the kernel allows, A is
/// read once.
PackedA gemmThatPacks(Context& context, const Gemm& g);

}  // namespace qlora::QLORA_ISA
