#include "ops/roofline.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "simd/vector.h"

namespace qlora::QLORA_ISA {

namespace {

constexpr int kTries = 50;
constexpr int64_t kSteps = 200000;
constexpr int kUnrolled = 8;  // what a loop costs each time round must not show
constexpr int64_t kBytes = int64_t{256} << 20;
constexpr int64_t kPieces = 64;

// Enough sums to hide the latency, few enough to stay in registers.
constexpr int kSums = kRegisters == 32 ? 24 : (kVector == 8 ? 12 : 8);

// Keeps a value in a register, and the compiler from knowing it.
template <class T>
QLORA_INLINE void opaque(T& x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#endif
}

/// FLOP done by a loop of multiply-adds.
double multiplyAdds(int32_t compute) {
#if QLORA_ISA_avx512bf16
  if (compute == 1) {
    __m512 sum[kSums] = {};
    auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    for (int64_t i = 0; i < kSteps; i += kUnrolled) {
#pragma GCC unroll 8
      for (int step = 0; step < kUnrolled; ++step) {
#pragma GCC unroll 24
        for (auto& s : sum) {
          s = _mm512_dpbf16_ps(s, x, x);
          opaque(s);
        }
      }
    }
    return static_cast<double>(kSteps) * kSums * 4 * kVector;
  }
#endif
  static_cast<void>(compute);
  Vector sum[kSums] = {}, x = broadcast(1.0f);
  for (int64_t i = 0; i < kSteps; i += kUnrolled) {
#pragma GCC unroll 8
    for (int step = 0; step < kUnrolled; ++step) {
#pragma GCC unroll 24
      for (auto& s : sum) {
        s = multiplyAdd(x, x, s);
        opaque(s);
      }
    }
  }
  return static_cast<double>(kSteps) * kSums * 2 * kVector;
}

template <class F>
double leastSeconds(F&& f) {
  double least = 1e9;
  for (int i = 0; i < kTries; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

}  // namespace

void roofline(Context& context, const Roofline& a) {
  float* rates = a.rates.data<float>();
  const int threads = context.pool.size();
  double flop = 0;
  const double computing = leastSeconds([&] {
    context.pool.parallelFor(threads, [&](int64_t i, int) {
      const double done = multiplyAdds(a.compute);
      if (i == 0) flop = done;
    });
  });
  rates[0] = static_cast<float>(flop * threads / computing / 1e9);

  auto* bytes = context.scratch.take<uint64_t>(kBytes / 8);
  auto* sums = context.scratch.take<uint64_t>(kPieces);
  std::memset(bytes, 1, kBytes);
  const double reading = leastSeconds([&] {
    context.pool.parallelFor(kPieces, [&](int64_t piece, int) {
      constexpr int64_t kWords = kBytes / 8 / kPieces;
      const uint64_t* from = bytes + piece * kWords;
      uint64_t sum[8] = {};
      for (int64_t i = 0; i < kWords; i += 8) {
        for (int l = 0; l < 8; ++l) sum[l] += from[i + l];
      }
      sums[piece] = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
    });
  });
  // Read once more, so that no loop above is without effect.
  double check = 0;
  for (int64_t i = 0; i < kPieces; ++i) check += static_cast<double>(sums[i]);
  rates[1] = check > 0 ? static_cast<float>(static_cast<double>(kBytes) / reading / 1e9) : 0.0f;
}

}  // namespace qlora::QLORA_ISA
