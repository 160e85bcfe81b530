// Byte for byte what the CPU stores: each operation on its own, and fp64 sums in the order of quantize.cpp.
#include "ops/quantize.h"

#include "core/codes.h"
#include "cuda/device.h"
#include "simd/block_scale.h"

namespace qlora::cuda {

namespace {

constexpr int kDynamicBlock = 256;
constexpr int64_t kSumChunk = int64_t{1} << 16;
constexpr int kSumLanes = 8;

template <class T>
QLORA_DEVICE uint32_t magnitudeOf(T x) {
  return __float_as_uint(toFloat(x)) & 0x7fffffff;
}

struct Smallest {
  QLORA_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

/// A warp has a block, a lane pairs of its elements: a byte each.
template <FourBitType type, class T>
__global__ void fourBitKernel(int64_t n, int64_t blockSize, const T* x, uint8_t* packed, float* absmax) {
  const int64_t blocks = (n + blockSize - 1) / blockSize;
  for (int64_t b = threadIndex() / kWarpSize; b < blocks; b += threadCount() / kWarpSize) {
    const int64_t end = min(n, (b + 1) * blockSize);
    const int64_t first = b * blockSize + 2 * laneIndex();
    uint32_t top = 0;
    for (int64_t i = first; i < end; i += 2 * kWarpSize) {
      top = max(top, magnitudeOf(x[i]));
      if (i + 1 < end) top = max(top, magnitudeOf(x[i + 1]));
    }
    const float most = __uint_as_float(warpReduce(top, Largest{}));
    if (laneIndex() == 0) absmax[b] = most;
    const float inverse = blockInverse(most);
    for (int64_t i = first; i < end; i += 2 * kWarpSize) {
      const float odd = i + 1 < end ? toFloat(x[i + 1]) : 0.0f;
      packed[i / 2] = static_cast<uint8_t>(fourBitIndex<type>(toFloat(x[i]) * inverse) << 4 |
                                           fourBitIndex<type>(odd * inverse));
    }
  }
}

/// *first = the first of n values that is not finite, else n. One block.
__global__ void firstNonFiniteKernel(int64_t n, const float* v, int64_t* first) {
  int64_t at = n;
  for (int64_t i = threadIdx.x; i < n && at == n; i += blockDim.x) {
    if (!isFinite(v[i])) at = i;
  }
  at = blockReduce(at, n, Smallest{});
  if (threadIdx.x == 0) *first = at;
}

/// In a rehearsal n: no value means anything there.
int64_t firstNonFinite(Context& context, const float* v, int64_t n) {
  constexpr int kMostThreads = 1024;
  auto* onDevice = context.scratch.take<int64_t>(1);
  launch(context, firstNonFiniteKernel, 1, kMostThreads, 0, n, v, onDevice);
  int64_t first = n;
  if (context.queue) context.queue->read(&first, onDevice, sizeof first);
  return first;
}

[[noreturn]] void failNonFinite(const char* op, int64_t block, int64_t blockSize, int64_t n) {
  fail("ERR_QLORA_NON_FINITE", "%s: block %lld (elements %lld to %lld) holds a value that is not finite", op,
       static_cast<long long>(block), static_cast<long long>(block * blockSize),
       static_cast<long long>(std::min(n, (block + 1) * blockSize) - 1));
}

/// Eight lanes sum a chunk. A warp a chunk.
__global__ void sumChunksKernel(int64_t n, const float* v, double* partial) {
  const int64_t begin = blockIdx.x * kSumChunk, end = min(n, begin + kSumChunk);
  double sum = 0;
  if (laneIndex() < kSumLanes) {
    for (int64_t i = begin + laneIndex(); i < end; i += kSumLanes) sum += static_cast<double>(v[i]);
  }
  for (int mask = kSumLanes / 2; mask > 0; mask /= 2) sum += shuffleXor(sum, mask);
  if (laneIndex() == 0) partial[blockIdx.x] = sum;
}

__global__ void meanKernel(int64_t chunks, int64_t n, const double* partial, float* mean) {
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c];
  *mean = n > 0 ? static_cast<float>(sum / static_cast<double>(n)) : 0.0f;
}

struct MapThresholds {
  float value[256];
};

MapThresholds thresholdsOf(DynamicMapKind kind) {
  MapThresholds t;
  std::copy_n(dynamicMap(kind).threshold, 256, t.value);
  return t;
}

/// index and absmax of v - *offset (null: v). A block of threads a block of values.
__global__ void dynamicKernel(int64_t n, const float* v, const float* offset, MapThresholds thresholds, uint8_t* index,
                              float* absmax) {
  QLORA_SHARED_ARRAY(float, threshold, 256);
  threshold[threadIdx.x] = thresholds.value[threadIdx.x];
  const float centre = offset ? *offset : 0.0f;
  const int64_t blocks = (n + kDynamicBlock - 1) / kDynamicBlock;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t i = b * kDynamicBlock + threadIdx.x;
    const float x = i < n ? v[i] - centre : 0.0f;
    const float most = __uint_as_float(blockReduce(magnitudeOf(x), 0u, Largest{}));
    if (threadIdx.x == 0) absmax[b] = most;
    if (i >= n) continue;
    const float scaled = x * blockInverse(most);
    // The number of thresholds below it; the last is infinite.
    int below = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
      if (threshold[below + step - 1] < scaled) below += step;
    }
    index[i] = static_cast<uint8_t>(below);
  }
}

void quantizeDynamic(Context& context, DynamicMapKind kind, int64_t n, const float* v, const float* offset,
                     uint8_t* index, float* absmax) {
  const int64_t blocks = std::min<int64_t>((n + kDynamicBlock - 1) / kDynamicBlock, 65536);
  launch(context, dynamicKernel, blocks, kDynamicBlock, 0, n, v, offset, thresholdsOf(kind), index, absmax);
}

/// A block a row, which is rounded to fp16.
template <class T>
__global__ void int8Kernel(int64_t N, int64_t K, const T* x, int8_t* q, float* absmax) {
  for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
    const T* from = x + row * K;
    uint32_t top = 0;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) top = max(top, magnitudeOf(fromFloat<f16>(toFloat(from[k]))));
    const float most = __uint_as_float(blockReduce(top, 0u, Largest{}));
    if (threadIdx.x == 0) absmax[row] = most;
    const float scale = most > 0 ? 127.0f * (1.0f / most) : 0.0f;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
      // Adding 1.5 * 2^23 rounds to the nearest even integer.
      const float rounded = toFloat(fromFloat<f16>(toFloat(from[k]))) * scale + 0x1.8p23f - 0x1.8p23f;
      q[row * K + k] = static_cast<int8_t>(static_cast<int32_t>(rounded));
    }
  }
}

}  // namespace

void quantize4bit(Context& context, const Quantize4bit& a) {
  const int64_t n = a.x.size(), blocks = a.absmax.size();
  auto* packed = a.packed.data<uint8_t>();
  auto* absmax = a.absmax.data<float>();
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = a.type == static_cast<int>(FourBitType::nf4) ? fourBitKernel<FourBitType::nf4, T>
                                                                      : fourBitKernel<FourBitType::fp4, T>;
    launch(context, kernel, blocksFor(blocks * kWarpSize), kThreads, 0, n, a.blockSize, a.x.data<const T>(), packed,
           absmax);
  });
  const int64_t bad = firstNonFinite(context, absmax, blocks);
  if (bad < blocks) failNonFinite("quantize4bit", bad, a.blockSize, n);
}

void doubleQuantize(Context& context, const DoubleQuantize& a) {
  const int64_t n = a.absmax.size(), chunks = (n + kSumChunk - 1) / kSumChunk;
  const auto* absmax = a.absmax.data<const float>();
  auto* offset = a.offset.data<float>();
  auto* partial = context.scratch.take<double>(chunks);
  launch(context, sumChunksKernel, chunks, kWarpSize, 0, n, absmax, partial);
  launch(context, meanKernel, 1, kWarpSize, 0, chunks, n, partial, offset);
  // The mean is finite where all are.
  const int64_t bad = firstNonFinite(context, absmax, n);
  if (bad < n) failNonFinite("doubleQuantize", bad, 1, n);
  quantizeDynamic(context, DynamicMapKind::signedMap, n, absmax, offset, a.index.data<uint8_t>(),
                  a.nestedAbsmax.data<float>());
}

void quantize8bit(Context& context, const Quantize8bit& a) {
  const int64_t n = a.x.size(), blocks = a.absmax.size();
  auto* absmax = a.absmax.data<float>();
  quantizeDynamic(context, static_cast<DynamicMapKind>(a.map), n, a.x.data<const float>(), nullptr,
                  a.index.data<uint8_t>(), absmax);
  const int64_t bad = firstNonFinite(context, absmax, blocks);
  if (bad < blocks) failNonFinite("quantize8bit", bad, kDynamicBlock, n);
}

void quantizeInt8(Context& context, const QuantizeInt8& a) {
  const int64_t N = a.x.dim(0), K = a.x.dim(1);
  auto* absmax = a.absmax.data<float>();
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(context, int8Kernel<T>, std::min<int64_t>(N, 65536), kThreads, 0, N, K, a.x.data<const T>(),
           a.q.data<int8_t>(), absmax);
  });
  const int64_t bad = firstNonFinite(context, absmax, N);
  if (bad < N) {
    fail("ERR_QLORA_NON_FINITE", "quantizeInt8: row %lld holds a value that is not finite in fp16",
         static_cast<long long>(bad));
  }
}

}  // namespace qlora::cuda
