// Matrix products for every operation of CUDA's: the counterpart of simd/gemm.h, with its three forms.
//
//   nt:  C[M, N] = alpha * A[M, K] B[N, K]^T     forward of a linear layer (B the weight)
//   nn:  C[M, N] = alpha * A[M, K] B[K, N]       its backward to the input (B the weight)
//   tn:  C[M, N] = alpha * A[K, M]^T B[K, N]     its backward to the weight
//
// A second product may ride along in the same accumulators (`extra`: LoRA's, r more steps of K, which come first):
//   C = alpha * (mask . (A2 B2) + A B) + bias
//
// Which kernel does it follows from form, types, shape and the device's compute capability alone (gemm.cu):
//   gemm_plain.cu   any of them, by multiply-adds in fp32 without matrix instructions: f32, and shapes that have no
//                   rows of whole 16 bytes
//   gemm_few.cu     nt of at most 64 rows of A, 16-bit: reads the weight once, and several weights that multiply one A
//                   in one launch. Also nt and nn where C has at most 64 columns, as A B^T = (B A^T)^T: LoRA's products
//                   with x and dy
//   gemm_wide.cu    nt and nn of more than 64 rows on compute capability 9.0, both operands 16-bit: wgmma. A weight of
//                   another kind is converted first, slice by slice, since here that takes less than decoding a tile
//                   of it once for each tile of rows
//   gemm_tiles.h    the rest of 16 bits, by matrix instructions on tiles in shared memory, where 4 bits are decoded
//
// Precision: operands are rounded to `compute` (a 4-bit weight as fp32(code * absmax) is, so both directions see the
// same W; gemm_few.cu rounds the code and multiplies sums of a block by its absmax, which is as near), products and
// sums are fp32, summed in an order that depends on shape and kernel alone.
#pragma once

#include "cuda/weight.h"
#include "simd/dropout.h"

namespace qlora::cuda {

enum class GemmForm { nt, nn, tn };

/// A product that is added in the same accumulators, of the same form, M and N.
struct GemmExtra {
  Elements a, b;
  int64_t K = 0;                        // 0: there is none
  DropoutMask dropout{};                // of its elements
  int64_t maskRow = 0, maskColumn = 0;  // element (m, n) is m * maskRow + maskColumn + n; maskRow 0: N

  QLORA_DEVICE int64_t maskAt(int64_t m, int64_t n) const { return m * maskRow + maskColumn + n; }
};

/// What becomes of the sums.
struct GemmOutput {
  void* c;
  DType dtype;
  int64_t stride;
  int64_t columnStride = 1;
  float alpha = 1;
  bool add = false;            // C += ...
  const void* bias = nullptr;  // [N], added once
  DType biasDtype = DType::f32;
  const float* rowScale = nullptr;     // [M], multiplies what alpha multiplies
  const float* columnScale = nullptr;  // [N], likewise
  const void* residual = nullptr;      // [M, N] that lies as C does: is added to C as it was rounded

  QLORA_DEVICE static float read(const void* p, DType dtype, int64_t i) {
    return dtype == DType::f32    ? static_cast<const float*>(p)[i]
           : dtype == DType::bf16 ? toFloat(static_cast<const bf16*>(p)[i])
                                  : toFloat(static_cast<const f16*>(p)[i]);
  }

  QLORA_DEVICE float rounded(float value) const {
    return dtype == DType::f32    ? value
           : dtype == DType::bf16 ? toFloat(fromFloat<bf16>(value))
                                  : toFloat(fromFloat<f16>(value));
  }

  /// C[m, n] from its sum.
  QLORA_DEVICE void store(int64_t m, int64_t n, float sum) const {
    float value = sum * (rowScale ? alpha * rowScale[m] : alpha);
    if (columnScale) value *= columnScale[n];
    if (bias) value += read(bias, biasDtype, n);
    const int64_t at = m * stride + n * columnStride;
    if (add) value += read(c, dtype, at);
    if (residual) value = read(residual, dtype, at) + rounded(value);
    if (dtype == DType::f32) {
      static_cast<float*>(c)[at] = value;
    } else if (dtype == DType::bf16) {
      static_cast<bf16*>(c)[at] = fromFloat<bf16>(value);
    } else {
      static_cast<f16*>(c)[at] = fromFloat<f16>(value);
    }
  }
};

struct Gemm {
  GemmForm form;
  DType compute;
  int64_t M, N, K;
  Elements a, b;
  GemmOutput out;
  GemmExtra extra{};
};

void gemm(Context& context, const Gemm& g);
/// Products of one A, each as by itself: in one launch where gemmFew is for all of them, else one after the other in
/// the same scratch.
void gemms(Context& context, const Gemm* list, int count);

// The kernels by themselves, for gemm.cu.
constexpr int64_t kFewRows = 64;
void gemmPlain(Context& context, const Gemm& g);
/// Products of one A with weights of one kind: all dense, or all of 4 bits, in blocks of 32 or all of more.
constexpr int kMostTogether = 3;
void gemmFew(Context& context, const Gemm* list, int count);
/// Whether gemmWide is for it, as far as the shape goes.
bool isWide(const Context& context, const Gemm& g);
/// What its tiles take for C of that size and a K, in units of its own.
int64_t wideCost(const Context& context, int64_t M, int64_t N);
/// Operands, also the extra ones, are of the compute type in rows of whole 16 bytes. C is of that type too, with at
/// most a factor, in rows of whole 16 bytes; or fp32, without, in rows of whole 8. An extra product without dropout.
void gemmWide(Context& context, const Gemm& g);

/// The product of the leading dimensions.
inline int64_t leading(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i + 1 < t.rank; ++i) n *= t.shape[i];
  return n;
}

inline void setBias(GemmOutput& out, const Tensor& bias) {
  if (!bias.defined()) return;
  out.bias = bias.data<void>();
  out.biasDtype = bias.dtype;
}

/// The product of linearForward, where W is not of 8 bits.
Gemm linearGemm(const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& y, const GemmExtra& extra);

/// y = x W^T + bias + extra, W [N, K]; the compute type is x's. An 8-bit W multiplies as simd/linear.h says.
void linearForward(Context& context, const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& y,
                   const GemmExtra& extra);

}  // namespace qlora::cuda
