#include "ops/quantize.h"

#include <algorithm>
#include <cstring>

#include "simd/block_scale.h"
#include "simd/dynamic_map.h"
#include "simd/four_bit.h"

namespace qlora::QLORA_ISA {

namespace {

// Elements a task: whole blocks of every size.
constexpr int64_t kChunk = int64_t{1} << 16;
constexpr int64_t kLargestBlock = 4096;

int64_t chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

/// In a rehearsal no value means anything.
bool computes(const Context& context) { return &context.pool != &idlePool(); }

[[noreturn]] void failNonFinite(const char* op, int64_t block, int64_t blockSize, int64_t n) {
  fail("ERR_QLORA_NON_FINITE", "%s: block %lld (elements %lld to %lld) holds a value that is not finite", op,
       static_cast<long long>(block), static_cast<long long>(block * blockSize),
       static_cast<long long>(std::min(n, (block + 1) * blockSize) - 1));
}

template <FourBitType type, class T>
void quantizeBlocks(ThreadPool& pool, const T* x, int64_t n, int64_t blockSize, uint8_t* packed, float* absmax) {
  pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    int64_t i = chunk * kChunk;
    for (; i + blockSize <= end; i += blockSize) {
      const float top = blockAbsmax(x + i, blockSize);
      absmax[i / blockSize] = top;
      encodeFourBit<type>(x + i, blockSize, blockInverse(top), packed + i / 2);
    }
    if (i == end) return;
    // A short block is filled with zeros, whose code is also what pads an odd count.
    T v[kLargestBlock] = {};
    uint8_t bytes[kLargestBlock / 2];
    std::memcpy(v, x + i, static_cast<size_t>(end - i) * sizeof(T));
    const float top = blockAbsmax(v, blockSize);
    absmax[i / blockSize] = top;
    encodeFourBit<type>(v, blockSize, blockInverse(top), bytes);
    std::memcpy(packed + i / 2, bytes, static_cast<size_t>(end - i + 1) / 2);
  });
}

/// Of a row rounded to fp16.
template <class T>
float halfAbsmax(const T* v, int64_t n) {
  uint16_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<uint16_t>(fromFloat<f16>(toFloat(v[i])).bits & 0x7fff);
    top = magnitude > top ? magnitude : top;
  }
  return toFloat(f16{top});
}

template <class T>
void quantizeHalfRow(const T* __restrict v, int64_t n, float scale, int8_t* __restrict q) {
  for (int64_t i = 0; i < n; ++i) {
    // Adding 1.5 * 2^23 rounds to the nearest even integer.
    const float rounded = toFloat(fromFloat<f16>(toFloat(v[i]))) * scale + 0x1.8p23f - 0x1.8p23f;
    q[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
}

/// index and absmax of one block of at most 256 values.
float quantizeDynamic(const DynamicMap& map, const float* v, int64_t n, uint8_t* index) {
  const float absmax = blockAbsmax(v, n), inverse = blockInverse(absmax);
  for (int64_t i = 0; i < n; ++i) index[i] = dynamicIndex(map, v[i] * inverse);
  return absmax;
}

/// Sums of chunks in eight lanes each, added in order: the same bits whatever the number of threads.
double sumOf(Context& context, const float* v, int64_t n) {
  double* partial = context.scratch.take<double>(chunks(n));
  context.pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
    double lanes[8] = {};
    const int64_t begin = chunk * kChunk, count = std::min(n - begin, kChunk);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int l = 0; l < 8; ++l) lanes[l] += v[begin + i + l];
    }
    for (int l = 0; i + l < count; ++l) lanes[l] += v[begin + i + l];
    partial[chunk] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  });
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks(n); ++chunk) sum += partial[chunk];
  return sum;
}

}  // namespace

void quantize4bit(Context& context, const Quantize4bit& a) {
  const int64_t n = a.x.size();
  auto* packed = a.packed.data<uint8_t>();
  auto* absmax = a.absmax.data<float>();
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.type == static_cast<int>(FourBitType::nf4)) {
      quantizeBlocks<FourBitType::nf4>(context.pool, a.x.data<const T>(), n, a.blockSize, packed, absmax);
    } else {
      quantizeBlocks<FourBitType::fp4>(context.pool, a.x.data<const T>(), n, a.blockSize, packed, absmax);
    }
  });
  const int64_t bad = firstNonFinite(absmax, a.absmax.size());
  if (computes(context) && bad < a.absmax.size()) failNonFinite("quantize4bit", bad, a.blockSize, n);
}

void doubleQuantize(Context& context, const DoubleQuantize& a) {
  const int64_t n = a.absmax.size();
  const auto* absmax = a.absmax.data<const float>();
  const auto offset = n > 0 ? static_cast<float>(sumOf(context, absmax, n) / static_cast<double>(n)) : 0.0f;
  if (computes(context) && !isFinite(offset)) {
    const int64_t block = std::min(firstNonFinite(absmax, n), n - 1);
    failNonFinite("doubleQuantize", block, 1, n);
  }
  *a.offset.data<float>() = offset;
  auto* index = a.index.data<uint8_t>();
  auto* nested = a.nestedAbsmax.data<float>();
  const DynamicMap& map = dynamicMap(DynamicMapKind::signedMap);
  context.pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; i += kDynamicBlock) {
      float centred[kDynamicBlock];
      const int64_t count = std::min(end - i, kDynamicBlock);
      for (int64_t j = 0; j < count; ++j) centred[j] = absmax[i + j] - offset;
      nested[i / kDynamicBlock] = quantizeDynamic(map, centred, count, index + i);
    }
  });
}

void quantize8bit(Context& context, const Quantize8bit& a) {
  const int64_t n = a.x.size();
  const auto* x = a.x.data<const float>();
  auto* index = a.index.data<uint8_t>();
  auto* absmax = a.absmax.data<float>();
  const DynamicMap& map = dynamicMap(static_cast<DynamicMapKind>(a.map));
  context.pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; i += kDynamicBlock) {
      absmax[i / kDynamicBlock] = quantizeDynamic(map, x + i, std::min(end - i, kDynamicBlock), index + i);
    }
  });
  const int64_t bad = firstNonFinite(absmax, a.absmax.size());
  if (computes(context) && bad < a.absmax.size()) failNonFinite("quantize8bit", bad, kDynamicBlock, n);
}

void quantizeInt8(Context& context, const QuantizeInt8& a) {
  const int64_t N = a.x.dim(0), K = a.x.dim(1);
  auto* q = a.q.data<int8_t>();
  auto* absmax = a.absmax.data<float>();
  const int64_t rowsPerTask = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, K));
  dispatchFloat(a.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = a.x.data<const T>();
    context.pool.parallelFor((N + rowsPerTask - 1) / rowsPerTask, [&](int64_t task, int) {
      for (int64_t row = task * rowsPerTask; row < std::min(N, (task + 1) * rowsPerTask); ++row) {
        const float top = absmax[row] = halfAbsmax(x + row * K, K);
        quantizeHalfRow(x + row * K, K, top > 0 ? 127.0f * (1.0f / top) : 0.0f, q + row * K);
      }
    });
  });
  const int64_t bad = firstNonFinite(absmax, N);
  if (computes(context) && bad < N) {
    fail("ERR_QLORA_NON_FINITE", "quantizeInt8: row %lld holds a value that is not finite in fp16",
         static_cast<long long>(bad));
  }
}

}  // namespace qlora::QLORA_ISA
