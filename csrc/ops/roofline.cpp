#include "ops/roofline.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "simd/vector.h"
#if QLORA_ISA_amx
#include "simd/gemm_amx.h"
#endif

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
#if QLORA_ISA_avx512bf16 && !QLORA_ISA_amx
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

#if QLORA_ISA_amx
// Half of the second cache, read from there again and again.
constexpr int64_t kTileOperands = (int64_t{1} << 20) / sizeof(bf16);
constexpr int kTilePasses = 16;

/// FLOP done by products of tiles as a matmul makes them: two tiles of A and two of B give four products.
template <class Tiles>
double multiplyTiles(const bf16* operands) {
  constexpr int64_t kTileSize = kTileRows * kTileDepth;
  alignas(64) float sums[kSumsSize];
  Tiles tiles;
  forEachSum<2, 2>(sums, kTileLanes, [&]<int C>(float*) { tiles.template zero<C>(); });
  for (int pass = 0; pass < kTilePasses; ++pass) {
    for (int64_t i = 0; i < kTileOperands; i += 4 * kTileSize) {
      tiles.template load<4>(operands + i, kTileBytes);
      tiles.template load<6>(operands + i + kTileSize, kTileBytes);
      tiles.template multiplyAdd<0, 4, 6>();
      tiles.template load<7>(operands + i + 2 * kTileSize, kTileBytes);
      tiles.template multiplyAdd<1, 4, 7>();
      tiles.template load<5>(operands + i + 3 * kTileSize, kTileBytes);
      tiles.template multiplyAdd<2, 5, 6>();
      tiles.template multiplyAdd<3, 5, 7>();
    }
  }
  forEachSum<2, 2>(sums, kTileLanes, [&]<int C>(float* at) { tiles.template store<C>(at, kTileLanes * 4); });
  asm volatile("" : : "r"(sums) : "memory");  // somebody may read them
  return 2.0 * kTilePasses * static_cast<double>(kTileOperands) * kTileRows;
}

/// The same for the kind of tiles that are in use. `operands` are the thread's own.
double multiplyTiles(const bf16* operands) {
  [[maybe_unused]] const AmxEngine::Session session;
  return tilesAreEmulated() ? multiplyTiles<EmulatedTiles>(operands) : multiplyTiles<HardwareTiles>(operands);
}
#endif

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
#if QLORA_ISA_amx
  auto* operands = context.scratch.take<bf16>(threads * kTileOperands);
  std::fill_n(operands, threads * kTileOperands, fromFloat<bf16>(1.0f));
#endif
  const double computing = leastSeconds([&] {
    context.pool.parallelFor(threads, [&](int64_t i, int) {
#if QLORA_ISA_amx
      const double done = a.compute == 1 ? multiplyTiles(operands + i * kTileOperands) : multiplyAdds(a.compute);
#else
      const double done = multiplyAdds(a.compute);
#endif
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
