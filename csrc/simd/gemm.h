// Matrix products for every operation of the CPU: one blocked algorithm, in which reading an operand (decoding 4 bits,
// converting 16) is the packing that such an algorithm does anyway.
//
//   nt:  C[M, N] = alpha * A[M, K] B[N, K]^T     forward of a linear layer (B the weight)
//   nn:  C[M, N] = alpha * A[M, K] B[K, N]       its backward to the input (B the weight)
//   tn:  C[M, N] = alpha * A[K, M]^T B[K, N]     its backward to the weight
#pragma once

#include "core/stream.h"
#include "ops/weight.h"

namespace qlora::QLORA_ISA {

enum class GemmForm { nt, nn, tn };
enum class GemmStore { overwrite, add };  // add: C += ...

/// A dense operand where it lies: element (i, j) at data[i * stride + j].
struct GemmOperand {
  const void* data;
  DType dtype;  // f32, bf16 or f16
  int64_t stride;
  const Weight* weight = nullptr;  // B only: a weight of any kind in place of the three above
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
  const float* bias = nullptr;  // [N], added once
};

/// Runs on the whole pool. The bits of the result do not depend on the number of threads.
void gemm(Context& context, const Gemm& g);

}  // namespace qlora::QLORA_ISA
