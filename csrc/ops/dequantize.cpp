#include "ops/dequantize.h"

#include <algorithm>
#include <cstring>

#include "simd/block_scale.h"
#include "simd/dynamic_map.h"
#include "simd/four_bit.h"

namespace qlora::QLORA_ISA {

namespace {

// Elements a task: whole blocks of every size.
constexpr int64_t kChunk = int64_t{1} << 16;

int64_t chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

/// The absmax of 4-bit blocks, with or without double quantization.
struct BlockScales {
  const float* absmax;  // null with double quantization
  const uint8_t* index;
  const float *nestedAbsmax, *nestedCode;
  float offset;

  explicit BlockScales(const Weight& w)
      : absmax(w.absmax.dtype == DType::f32 ? w.absmax.data<const float>() : nullptr),
        index(absmax ? nullptr : w.absmax.data<const uint8_t>()),
        nestedAbsmax(absmax ? nullptr : w.nestedAbsmax.data<const float>()),
        nestedCode(absmax ? nullptr : w.nestedCode.data<const float>()),
        offset(w.offset) {}

  QLORA_INLINE float operator[](int64_t block) const {
    return absmax ? absmax[block] : nestedCode[index[block]] * nestedAbsmax[block / kDynamicBlock] + offset;
  }
};

template <class T>
void dequantizeFourBit(ThreadPool& pool, const Weight& w, T* y) {
  const int64_t n = w.N * w.K;
  const auto* packed = w.data.data<const uint8_t>();
  const auto* code = w.code.data<const float>();
  const BlockScales scales(w);
  pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; i += w.blockSize) {
      decodeFourBit(packed + i / 2, std::min(end - i, w.blockSize), code, scales[i / w.blockSize], y + i);
    }
  });
}

template <class T>
void dequantizeInt8Row(const int8_t* __restrict q, int64_t n, float absmax, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = fromFloat<T>(static_cast<float>(q[i]) * absmax * (1.0f / 127));
}

template <class T>
void dequantizeInt8(ThreadPool& pool, const Weight& w, T* y) {
  const auto* q = w.data.data<const int8_t>();
  const auto* absmax = w.absmax.data<const float>();
  const int64_t rowsPerTask = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, w.K));
  pool.parallelFor((w.N + rowsPerTask - 1) / rowsPerTask, [&](int64_t task, int) {
    for (int64_t row = task * rowsPerTask; row < std::min(w.N, (task + 1) * rowsPerTask); ++row) {
      dequantizeInt8Row(q + row * w.K, w.K, absmax[row], y + row * w.K);
    }
  });
}

template <class From, class To>
void convertChunk(const From* __restrict x, int64_t n, To* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = fromFloat<To>(toFloat(x[i]));
}

template <class T>
void convert(ThreadPool& pool, const Tensor& x, T* y) {
  dispatchFloat(x.dtype, [&](auto zero) {
    const auto* v = x.data<const decltype(zero)>();
    const int64_t n = x.size();
    pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
      convertChunk(v + chunk * kChunk, std::min(kChunk, n - chunk * kChunk), y + chunk * kChunk);
    });
  });
}

}  // namespace

void dequantize(Context& context, const Dequantize& a) {
  dispatchFloat(a.y.dtype, [&](auto zero) {
    auto* y = a.y.data<decltype(zero)>();
    if (isFloat(a.weight.data.dtype)) return convert(context.pool, a.weight.data, y);
    if (a.weight.data.dtype == DType::i8) return dequantizeInt8(context.pool, a.weight, y);
    dequantizeFourBit(context.pool, a.weight, y);
  });
}

void dequantize8bit(Context& context, const Dequantize8bit& a) {
  const int64_t n = a.index.size();
  const auto* index = a.index.data<const uint8_t>();
  const auto* absmax = a.absmax.data<const float>();
  auto* y = a.y.data<float>();
  const float* code = dynamicMap(static_cast<DynamicMapKind>(a.map)).code;
  context.pool.parallelFor(chunks(n), [&](int64_t chunk, int) {
    for (int64_t i = chunk * kChunk; i < std::min(n, (chunk + 1) * kChunk); ++i) {
      y[i] = code[index[i]] * absmax[i / kDynamicBlock];
    }
  });
}

void fourBitCode(Context&, const FourBitCode& a) {
  std::memcpy(a.y.data<float>(), fourBitCode(static_cast<FourBitType>(a.type)), 16 * sizeof(float));
}

void dynamicMapCode(Context&, const DynamicMapCode& a) {
  std::memcpy(a.y.data<float>(), dynamicMap(static_cast<DynamicMapKind>(a.map)).code, 256 * sizeof(float));
}

}  // namespace qlora::QLORA_ISA
