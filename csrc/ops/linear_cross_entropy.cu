// Head and loss on a GPU. The rows whose label counts are known to the host, which has the labels. They go through in
// chunks: h's rows are gathered, logits = h W^T (cuda/gemm.h), a block a row turns logits into the row's loss and their
// gradient, and that gives dh and dweight while it is at hand.
#include <cfloat>

#include "cuda/gemm.h"
#include "ops/linear_cross_entropy.h"

namespace qlora::cuda {

namespace {

// Logits of a chunk: 256 MiB, but never more than about a third of all, nor fewer rows than a tile of the products has.
constexpr int64_t kLogitsPerChunk = 64 << 20, kRowUnit = 128, kLeastChunks = 3;
// Of the vocabulary, what dh sums over at once in f32: sums of 100,000 terms would lose digits.
constexpr int64_t kSumsAtOnce = 512;

template <class T>
__global__ void gatherKernel(int64_t rows, int64_t C, const int32_t* row, const T* h, T* y) {
  for (int64_t i = threadIndex(); i < rows * C; i += threadCount()) y[i] = h[row[i / C] * C + i % C];
}

/// Gradients are those of lossScale x loss.
struct GradientScale {
  float scale;
  const float* lossScale;  // null for 1
  QLORA_DEVICE float operator()() const { return lossScale ? scale * *lossScale : scale; }
};

template <class T>
__global__ void scatterKernel(int64_t rows, int64_t C, const int32_t* row, const float* sums, GradientScale scale,
                              T* dh) {
  for (int64_t i = threadIndex(); i < rows * C; i += threadCount()) {
    dh[row[i / C] * C + i % C] = fromFloat<T>(sums[i] * scale());
  }
}

__global__ void repeatKernel(int64_t n, GradientScale scale, float* y) {
  for (int64_t i = threadIndex(); i < n; i += threadCount()) y[i] = scale();
}

/// A sum of e^(z - largest), which may still rise.
struct ExpSum {
  float largest;
  double sum;
};
struct MergeExpSums {
  QLORA_DEVICE ExpSum operator()(const ExpSum& a, const ExpSum& b) const {
    const float largest = fmaxf(a.largest, b.largest);
    return {largest, a.sum * static_cast<double>(expf(a.largest - largest)) +
                         b.sum * static_cast<double>(expf(b.largest - largest))};
  }
};

/// Warp shuffles take 8 bytes at most.
QLORA_DEVICE ExpSum blockExpSum(ExpSum own) {
  const float largest = blockMax(own.largest);
  own = MergeExpSums{}({largest, 0.0}, own);
  return {largest, blockReduce(own.sum, 0.0, Sum{})};
}

/// A block a row: its loss, and in place of (or beside) its logits their gradient, 0 from V up to the stride.
template <class T>
__global__ void lossKernel(int64_t V, int64_t stride, const float* logits, const int32_t* row, const int32_t* labels,
                           float cap, double* rowLoss, float* tokenLoss, T* gradient) {
  const int64_t i = blockIdx.x;
  const float* x = logits + i * stride;
  const auto capped = [&](float value) { return cap > 0 ? cap * tanhf(value / cap) : value; };
  ExpSum own{-FLT_MAX, 0.0};
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
    const float z = capped(x[v]);
    if (z > own.largest) {
      own.sum *= static_cast<double>(expf(own.largest - z));
      own.largest = z;
    }
    own.sum += static_cast<double>(expf(z - own.largest));
  }
  const ExpSum all = blockExpSum(own);
  const double logSum = static_cast<double>(all.largest) + log(all.sum);
  const int32_t label = labels[row[i]];
  if (threadIdx.x == 0) {
    const double loss = logSum - static_cast<double>(capped(x[label]));
    rowLoss[i] = loss;
    if (tokenLoss) tokenLoss[row[i]] = static_cast<float>(loss);
  }
  if (!gradient) return;  // the whole block
  syncBlock();
  const float shift = static_cast<float>(logSum);
  for (int64_t v = threadIdx.x; v < stride; v += blockDim.x) {
    float d = 0;
    if (v < V) {
      const float z = capped(x[v]), t = cap > 0 ? z / cap : 0.0f;
      // e^x - 1 cancels where the model is sure.
      d = (v == label ? expm1f(z - shift) : expf(z - shift)) * (1.0f - t * t);
    }
    gradient[i * stride + v] = fromFloat<T>(d);
  }
}

/// One block. Its threads sum in strides, then in a fixed tree.
__global__ void sumKernel(int64_t n, const double* rowLoss, float scale, float* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += rowLoss[i];
  sum = blockReduce(sum, 0.0, Sum{});
  if (threadIdx.x == 0) *loss = static_cast<float>(static_cast<double>(scale) * sum);
}

std::vector<int32_t> countedRows(Context& context, const LinearCrossEntropy& a) {
  const std::vector<int32_t> labels = hostValues(context, a.labels);
  std::vector<int32_t> rows;
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] == kIgnoredLabel) continue;
    if (labels[i] < 0 || labels[i] >= a.weight.N) {
      // A rehearsal has no labels; it is for a vocabulary of any size.
      if (!context.queue) break;
      fail("ERR_QLORA_TOKEN_ID", "linearCrossEntropy: label %d at position %lld is outside the vocabulary of %lld",
           labels[i], static_cast<long long>(i), static_cast<long long>(a.weight.N));
    }
    rows.push_back(static_cast<int32_t>(i));
  }
  return rows;
}

/// A product whose scratch is handed back before the next one's is taken.
void gemmAlone(Context& context, const Gemm& g) {
  Scratch scratch = context.scratch.nested();
  Context own{context.pool, scratch, context.queue, context.device};
  gemm(own, g);
}

/// Calls f(first, how many) for parts of the vocabulary: in f32 those of one sum, in 16 bits what fills whole 16 bytes
/// and the rest. A quantized weight, whose blocks cannot be told apart by rows, goes whole.
template <class T, class F>
void forSlices(const Weight& weight, F&& f) {
  const int64_t V = weight.N, whole = V / kPack<T> * kPack<T>;
  const bool isDense = isFloat(weight.data.dtype);
  const int64_t most = !isDense ? V : std::is_same_v<T, float> ? kSumsAtOnce : std::max<int64_t>(whole, 1);
  for (int64_t first = 0; first < V; first += most) f(first, std::min(most, V - first));
}

/// A dense weight's rows from `first` on, or all of another one.
Elements rowsFrom(const Weight& weight, int64_t first) {
  Elements rows = elementsOf(weight);
  rows.data = static_cast<const char*>(rows.data) + static_cast<size_t>(first * weight.K) * sizeOf(rows.dtype);
  return rows;
}

template <class T>
constexpr DType kTypeOf = std::is_same_v<T, float>  ? DType::f32
                          : std::is_same_v<T, bf16> ? DType::bf16
                                                    : DType::f16;

template <class T>
void lossOf(Context& context, const LinearCrossEntropy& a, const std::vector<int32_t>& rows) {
  const int64_t M = a.h.rows(), V = a.weight.N, C = a.weight.K, count = static_cast<int64_t>(rows.size());
  const int64_t stride = (V + kPack<T> - 1) / kPack<T> * kPack<T>;
  const auto units = [](int64_t n) { return std::max<int64_t>(1, n / kRowUnit) * kRowUnit; };
  const int64_t most = std::min(units(kLogitsPerChunk / std::max<int64_t>(stride, 1)),
                                units((count + kLeastChunks - 1) / kLeastChunks + kRowUnit - 1));
  const int64_t perChunk = std::min(count, most);
  const bool wantsGradient = a.dh.defined() || a.dweight.defined();

  int32_t* row = context.scratch.take<int32_t>(count);
  double* rowLoss = context.scratch.take<double>(count);
  float* logits = context.scratch.take<float>(perChunk * stride);
  T* hRows = context.scratch.take<T>(perChunk * C);
  // In f32 the gradient takes the logits' place.
  T* gradient = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    if (wantsGradient) gradient = logits;
  } else {
    if (wantsGradient) gradient = context.scratch.take<T>(perChunk * stride);
  }
  float* sums = a.dh.defined() ? context.scratch.take<float>(perChunk * C) : nullptr;
  float* scales = a.dweight.defined() ? context.scratch.take<float>(C) : nullptr;
  const GradientScale scale{a.scale, a.lossScale.dataOrNull<float>()};
  float* tokenLoss = a.tokenLoss.dataOrNull<float>();
  if (tokenLoss) setBytes(context, tokenLoss, 0, static_cast<size_t>(M) * sizeof(float));
  if (a.dh.defined()) setBytes(context, a.dh.data<void>(), 0, static_cast<size_t>(M * C) * sizeof(T));
  if (scales) launch(context, repeatKernel, blocksFor(C), kThreads, 0, C, scale, scales);
  if (context.queue && count) context.queue->write(row, rows.data(), rows.size() * sizeof(int32_t));

  for (int64_t first = 0; first < count; first += perChunk) {
    const int64_t m = std::min(perChunk, count - first);
    launch(context, gatherKernel<T>, blocksFor(m * C), kThreads, 0, m, C, row + first, a.h.data<T>(), hRows);
    const Elements h{.data = hRows, .dtype = kTypeOf<T>, .stride = C};
    Gemm forward{.form = GemmForm::nt,
                 .compute = kTypeOf<T>,
                 .M = m,
                 .N = V,
                 .K = C,
                 .a = h,
                 .b = elementsOf(a.weight),
                 .out = {.c = logits, .dtype = DType::f32, .stride = stride}};
    setBias(forward.out, a.bias);
    gemmAlone(context, forward);
    launch(context, lossKernel<T>, m, kThreads, 0, V, stride, logits, row + first, a.labels.data<int32_t>(), a.softCap,
           rowLoss + first, tokenLoss, gradient);
    const auto gradientFrom = [&](int64_t v) {
      return Elements{.data = gradient + v, .dtype = kTypeOf<T>, .stride = stride};
    };
    if (a.dh.defined()) {
      forSlices<T>(a.weight, [&](int64_t v, int64_t n) {
        gemmAlone(context, {.form = GemmForm::nn,
                            .compute = kTypeOf<T>,
                            .M = m,
                            .N = C,
                            .K = n,
                            .a = gradientFrom(v),
                            .b = rowsFrom(a.weight, v),
                            .out = {.c = sums, .dtype = DType::f32, .stride = C, .add = v > 0}});
      });
      launch(context, scatterKernel<T>, blocksFor(m * C), kThreads, 0, m, C, row + first, sums, scale, a.dh.data<T>());
    }
    if (a.dweight.defined()) {
      forSlices<T>(a.weight, [&](int64_t v, int64_t n) {
        gemmAlone(context, {.form = GemmForm::tn,
                            .compute = kTypeOf<T>,
                            .M = n,
                            .N = C,
                            .K = m,
                            .a = gradientFrom(v),
                            .b = h,
                            .out = {.c = a.dweight.data<float>() + v * C,
                                    .dtype = DType::f32,
                                    .stride = C,
                                    .add = true,
                                    .columnScale = scales}});
      });
    }
  }
  launch(context, sumKernel, 1, kThreads, 0, count, rowLoss, a.scale, a.loss.data<float>());
}

}  // namespace

void linearCrossEntropy(Context& context, const LinearCrossEntropy& a) {
  const std::vector<int32_t> rows = countedRows(context, a);
  dispatchFloat(a.h.dtype, [&](auto zero) { lossOf<decltype(zero)>(context, a, rows); });
}

}  // namespace qlora::cuda
