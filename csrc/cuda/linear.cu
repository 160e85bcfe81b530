// The frozen layer of a linear operation. With an 8-bit W as simd/linear.h says; how many columns are outliers only
// the device knows, so that their product is a kernel that goes as far as it must, and nothing waits for the host.
#include "cuda/gemm.h"
#include "cuda/map.h"

namespace qlora::cuda {

namespace {

constexpr float kOutlier = 6.0f;
constexpr float kInverse16129 = 1.0f / 16129.0f;
constexpr int kRowsPerBlock = 64;
constexpr int kTile = 32;  // of the outliers' product

QLORA_DEVICE float roundToHalf(float x) { return toFloat(fromFloat<f16>(x)); }

/// outlier[k] = 1 where some row of x has an outlier in column k; others are left as they are.
template <class T>
__global__ void findOutliersKernel(int64_t M, int64_t K, const T* x, uint8_t* outlier) {
  const int64_t k = threadIndex(), first = int64_t{blockIdx.y} * kRowsPerBlock;
  if (k >= K) return;
  bool found = false;
  for (int64_t m = first; m < min(M, first + kRowsPerBlock); ++m) {
    found |= fabsf(roundToHalf(toFloat(x[m * K + k]))) >= kOutlier;
  }
  if (found) outlier[k] = 1;
}

/// columns = where outlier is set, ascending; *count of them. One warp.
__global__ void listOutliersKernel(int64_t K, const uint8_t* outlier, int32_t* columns, int32_t* count) {
  int found = 0;
  for (int64_t first = 0; first < K; first += kWarpSize) {
    const int64_t k = first + laneIndex();
    const bool own = k < K && outlier[k] != 0;
    const unsigned all = ballot(own);
    if (own) columns[found + __popc(all & ((1u << laneIndex()) - 1))] = static_cast<int32_t>(k);
    found += __popc(all);
  }
  if (laneIndex() == 0) *count = found;
}

/// Each row of x as integers, which bf16 holds; outliers and their columns are 0. A block a row.
template <class T>
__global__ void integersKernel(int64_t M, int64_t K, const T* x, const uint8_t* outlier, bf16* codes, float* absmax) {
  for (int64_t m = blockIdx.x; m < M; m += gridDim.x) {
    float most = 0;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
      const float magnitude = fabsf(roundToHalf(toFloat(x[m * K + k])));
      if (magnitude < kOutlier) most = fmaxf(most, magnitude);
    }
    most = blockReduce(most, 0.0f, Largest{});
    if (threadIdx.x == 0) absmax[m] = most;
    const float scale = most > 0 ? 127.0f * (1.0f / most) : 0.0f;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
      const float value = outlier[k] ? 0.0f : roundToHalf(toFloat(x[m * K + k])) * scale;
      codes[m * K + k] = fromFloat<bf16>(rintf(value));
    }
  }
}

/// sum += x[:, columns] W[:, columns]^T in fp16. A thread an element of sum; blockIdx.x goes over rows, which may be
/// more than 65535 tiles.
template <class T>
__global__ void addOutliersKernel(int64_t M, int64_t N, int64_t K, const T* x, Elements w, const int32_t* columns,
                                  const int32_t* count, float* sum) {
  QLORA_SHARED_ARRAY(float, left, kTile*(kTile + 1));
  QLORA_SHARED_ARRAY(float, right, kTile*(kTile + 1));
  const int column = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int64_t m = int64_t{blockIdx.x} * kTile + row, n = int64_t{blockIdx.y} * kTile + column;
  const int64_t ownN = int64_t{blockIdx.y} * kTile + row;  // whose weights this thread fetches
  const int all = *count;
  float own = 0;
  for (int first = 0; first < all; first += kTile) {
    const bool some = first + column < all;
    const int64_t k = some ? columns[first + column] : 0;
    left[row * (kTile + 1) + column] = some && m < M ? roundToHalf(toFloat(x[m * K + k])) : 0.0f;
    right[row * (kTile + 1) + column] = some && ownN < N ? roundToHalf(w.at(ownN, k)) : 0.0f;
    syncBlock();
    for (int i = 0; i < kTile; ++i) own = fmaf(left[row * (kTile + 1) + i], right[column * (kTile + 1) + i], own);
    syncBlock();
  }
  if (m < M && n < N) sum[m * N + n] += own;
}

struct Same {
  QLORA_DEVICE float operator()(int64_t, float x) const { return x; }
};

void forwardInt8(Context& context, const Tensor& x, const Weight& weight, const GemmOutput& out,
                 const GemmExtra& extra) {
  const int64_t M = leading(x), N = weight.N, K = weight.K;
  auto* codes = context.scratch.take<bf16>(M * K);
  auto* absmax = context.scratch.take<float>(M);
  auto* outlier = context.scratch.take<uint8_t>(K);
  auto* columns = context.scratch.take<int32_t>(K);
  auto* count = context.scratch.take<int32_t>(1);
  const bool inPlace = out.dtype == DType::f32;
  float* sum = inPlace ? static_cast<float*>(out.c) : context.scratch.take<float>(M * N);
  setBytes(context, outlier, 0, static_cast<size_t>(K));
  dispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>((K + kThreads - 1) / kThreads),
                    static_cast<unsigned>((M + kRowsPerBlock - 1) / kRowsPerBlock));
    launch(context, findOutliersKernel<T>, grid, kThreads, 0, M, K, x.data<T>(), outlier);
    launch(context, listOutliersKernel, 1, kWarpSize, 0, K, outlier, columns, count);
    launch(context, integersKernel<T>, std::min<int64_t>(M, 65536), kThreads, 0, M, K, x.data<T>(), outlier, codes,
           absmax);
  });
  // Codes are below 2^8, so bf16 holds them and fp32 their products and sums.
  gemm(context, {.form = GemmForm::nt,
                 .compute = DType::bf16,
                 .M = M,
                 .N = N,
                 .K = K,
                 .a = {.data = codes, .dtype = DType::bf16, .stride = K},
                 .b = {.data = weight.data.data<void>(), .dtype = DType::i8, .stride = K},
                 .out = {.c = sum,
                         .dtype = DType::f32,
                         .stride = N,
                         .alpha = kInverse16129,
                         .bias = out.bias,
                         .biasDtype = out.biasDtype,
                         .rowScale = absmax,
                         .columnScale = weight.absmax.data<float>()}});
  dispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(static_cast<unsigned>((M + kTile - 1) / kTile), static_cast<unsigned>((N + kTile - 1) / kTile));
    launch(context, addOutliersKernel<T>, grid, dim3(kTile, kTile), 0, M, N, K, x.data<T>(), elementsOf(weight),
           columns, count, sum);
  });
  if (extra.K > 0) {
    gemm(context, {.form = GemmForm::nt,
                   .compute = x.dtype,
                   .M = M,
                   .N = N,
                   .K = extra.K,
                   .a = extra.a,
                   .b = extra.b,
                   .out = {.c = sum, .dtype = DType::f32, .stride = N, .add = true}});
  }
  if (inPlace) return;
  dispatchFloat(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    map(context, M * N, Same{}, static_cast<T*>(out.c), static_cast<const float*>(sum));
  });
}

}  // namespace

Gemm linearGemm(const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& y, const GemmExtra& extra) {
  Gemm g{.form = GemmForm::nt,
         .compute = x.dtype,
         .M = leading(x),
         .N = weight.N,
         .K = weight.K,
         .a = elementsOf(x),
         .b = elementsOf(weight),
         .out = {.c = y.data<void>(), .dtype = y.dtype, .stride = weight.N},
         .extra = extra};
  setBias(g.out, bias);
  return g;
}

void linearForward(Context& context, const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& y,
                   const GemmExtra& extra) {
  const Gemm g = linearGemm(x, weight, bias, y, extra);
  if (weight.data.dtype == DType::i8) return forwardInt8(context, x, weight, g.out, extra);
  gemm(context, g);
}

}  // namespace qlora::cuda
