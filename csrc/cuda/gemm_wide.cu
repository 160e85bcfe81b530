// Products of many rows on compute capability 9.0: both operands come from memory by tensor maps (tma.h) and are
// multiplied where they arrive in shared memory (wgmma.h).
//
// A block stays on its multiprocessor and takes tile after tile of C, 128 x 256 or 128 x 128. It has three groups of
// four warps with roles of their own, which meet at barriers only:
//
//   the first    one thread of it asks for the tiles of A and B, step by step of 64 along K, as long as a stage of
//                shared memory is free; while the others store one tile of C it is already at the next
//   the others   64 rows of C each: wait for a stage, begin its products, and give the stage before back, whose
//                products have ended by then
//
// The extra product comes first, as further steps. C is stored as it is, or what else is to become of the sums is
// another kernel's (gemm.cu), since a thread has 128 of them and few registers more. C's tiles are taken in an order in
// which blocks that work at the same time share rows of A and of B in the second cache. Left out: clusters that share a
// tile by multicast, stores by tensor maps, a third group that computes while another stores.
#include "cuda/gemm.h"
#include "cuda/tma.h"
#include "cuda/wgmma.h"

namespace qlora::cuda {

namespace {

constexpr int64_t kWideRows = 64;  // more than
constexpr int kConsumers = 2, kThreadsOfBlock = (1 + kConsumers) * kGroupThreads;
constexpr int kTileM = kConsumers * kGroupRows, kDepth = 64;

struct WideMaps {
  TensorMap a, b, extraA, extraB;
};

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kTilesTogether = 16;  // of M, before the next of N
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

/// Tile t of C, in tiles.
struct TilePosition {
  int m, n;
};
QLORA_DEVICE TilePosition tileAt(int t, int tilesM, int tilesN) {
  const int band = t / (kTilesTogether * tilesN), within = t % (kTilesTogether * tilesN);
  const int rows = min(kTilesTogether, tilesM - band * kTilesTogether);
  return {band * kTilesTogether + within % rows, within / rows};
}

template <class T, class Out, GemmForm form, int tileN>
struct WideBlock {
  static constexpr bool innerB = form == GemmForm::nt;
  static constexpr int kStages = tileN == 256 ? 4 : 6, n8 = tileN / 8;

  struct Stage {
    alignas(kSwizzledBytes) T a[kTileM * kDepth];
    alignas(kSwizzledBytes) T b[tileN * kDepth];
  };
  struct Shared {
    Stage stage[kStages];
    Barrier full[kStages], empty[kStages];
  };

  const Gemm& g;
  Shared& shared;
  int tilesM, tilesN, extraSteps, steps;  // steps: with the extra ones

  QLORA_DEVICE WideBlock(const Gemm& g, Shared& shared)
      : g(g),
        shared(shared),
        tilesM(static_cast<int>((g.M + kTileM - 1) / kTileM)),
        tilesN(static_cast<int>((g.N + tileN - 1) / tileN)),
        extraSteps(static_cast<int>((g.extra.K + kDepth - 1) / kDepth)),
        steps(extraSteps + static_cast<int>((g.K + kDepth - 1) / kDepth)) {}

  /// Calls f(firstM, firstN) for each tile of this block.
  template <class F>
  QLORA_DEVICE void forTiles(F&& f) const {
    for (int t = static_cast<int>(blockIdx.x); t < tilesM * tilesN; t += static_cast<int>(gridDim.x)) {
      const TilePosition at = tileAt(t, tilesM, tilesN);
      f(int64_t{at.m} * kTileM, int64_t{at.n} * tileN);
    }
  }

  /// By one thread.
  QLORA_DEVICE void produce(const WideMaps& maps) {
    int turn = 0;
    forTiles([&](int64_t firstM, int64_t firstN) {
      for (int step = 0; step < steps; ++step, ++turn) {
        const int s = turn % kStages;
        Stage& stage = shared.stage[s];
        Barrier& full = shared.full[s];
        shared.empty[s].wait((turn / kStages & 1) ^ 1);
        full.arriveExpecting((kTileM + tileN) * kDepth * static_cast<int>(sizeof(T)));
        const bool extra = step < extraSteps;
        const int64_t k = int64_t{extra ? step : step - extraSteps} * kDepth;
        copyBox(stage.a, extra ? maps.extraA : maps.a, firstM, k, full);
        const TensorMap& b = extra ? maps.extraB : maps.b;
        if constexpr (innerB) {
          copyBox(stage.b, b, firstN, k, full);
        } else {
#pragma unroll
          for (int n = 0; n < tileN; n += kBoxColumns) copyBox(stage.b + n * kDepth, b, k, firstN + n, full);
        }
      }
    });
  }

  /// By a group.
  QLORA_DEVICE void consume() {
    const int group = warpIndex() / 4 - 1;
    const auto giveBack = [&](int turn) {
      syncWarp();
      if (laneIndex() == 0) shared.empty[turn % kStages].arrive();
    };
    int turn = 0;
    forTiles([&](int64_t firstM, int64_t firstN) {
      float sum[n8][4] = {};
      const int64_t m = firstM + group * kGroupRows + warpIndex() % 4 * 16 + laneIndex() / 4;
      for (int step = 0; step < steps; ++step, ++turn) {
        const Stage& stage = shared.stage[turn % kStages];
        shared.full[turn % kStages].wait(turn / kStages & 1);
        const T* a = stage.a + group * kGroupRows * kDepth;
        beginGroup();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
          multiplyGroup<T, innerB>(sum, {a + k}, {stage.b + (innerB ? k : k * kBoxColumns), innerB ? 0 : kDepth * 128});
        }
        commitGroup();
        waitForOperands();
        if (step > 0) giveBack(turn - 1);
      }
      waitForGroups<0>(sum);
      giveBack(turn - 1);
      store(sum, m, firstN);
    });
  }

  QLORA_DEVICE void store(const float (&sum)[n8][4], int64_t m, int64_t firstN) const {
    const int t = laneIndex() % 4;
    auto* c = static_cast<Out*>(g.out.c);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = m + 8 * h;
      Out* to = c + row * g.out.stride + firstN;
      const int valid = row < g.M ? static_cast<int>(min(g.N - firstN, int64_t{tileN})) : 0;  // columns
#pragma unroll
      for (int j = 0; j < n8; j += 4) {
        if constexpr (sizeof(Out) == 4) {
#pragma unroll
          for (int i = j; i < j + 4; ++i) {
            const int n = 8 * i + 2 * t;
            if (n < valid) storePack<2>(to + n, Pack<float, 2>{{sum[i][2 * h], sum[i][2 * h + 1]}});
          }
        } else {
          // Lane t of four has two elements of each of four eights: it gets all of the t-th.
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = packWord<T>(sum[j + i][2 * h] * g.out.alpha, sum[j + i][2 * h + 1] * g.out.alpha);
          }
          transposeFour(words, t);
          const int n = 8 * (j + t);
          if (n < valid) *reinterpret_cast<uint4*>(to + n) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  /// Of lanes 4 q to 4 q + 3: word i of lane t goes to word t of lane i.
  QLORA_DEVICE static void transposeFour(uint32_t (&words)[4], int t) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & distance) continue;
        // The lane whose bit is set gives the word without it, and the other way round.
        const bool upper = t & distance;
        const uint32_t other = shuffleXor(upper ? words[i] : words[i + distance], distance);
        (upper ? words[i] : words[i + distance]) = other;
      }
    }
  }
};

#endif

template <class T, class Out, GemmForm form, int tileN>
__global__ void __launch_bounds__(kThreadsOfBlock, 1) wideKernel(Gemm g, QLORA_GRID_CONSTANT WideMaps maps) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Block = WideBlock<T, Out, form, tileN>;
  auto* bytes = dynamicShared<unsigned char>();
  bytes += (kSwizzledBytes - sharedAddress(bytes) % kSwizzledBytes) % kSwizzledBytes;
  auto& shared = *reinterpret_cast<typename Block::Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Block::kStages; ++s) {
      shared.full[s].init(1);
      shared.empty[s].init(kConsumers * kGroupThreads / kWarpSize);
    }
    showBarriers();
  }
  syncBlock();
  Block block(g, shared);
  if (threadIdx.x < kGroupThreads) {
    giveUpRegisters<kProducerRegisters>();
    if (threadIdx.x == 0) block.produce(maps);
  } else {
    takeRegisters<kConsumerRegisters>();
    block.consume();
  }
#endif
}

template <class T, class Out, GemmForm form, int tileN>
void launchWide(Context& context, const Gemm& g, int64_t tiles) {
  // Beyond 48 KiB of stages the compiler for other GPUs knows nothing of.
  constexpr int64_t stage = (kTileM + tileN) * kDepth * static_cast<int64_t>(sizeof(T));
  constexpr size_t sharedBytes = (tileN == 256 ? 4 : 6) * stage + 2 * kSwizzledBytes;
  constexpr bool innerB = form == GemmForm::nt;
  const auto mapOf = [&](const Elements& e, int64_t rows, int64_t columns, int boxRows) {
    return tensorMapOf(e.data, g.compute, rows, columns, e.stride, boxRows);
  };
  const auto mapOfB = [&](const Elements& e, int64_t K) {
    return innerB ? mapOf(e, g.N, K, tileN) : mapOf(e, K, g.N, kDepth);
  };
  WideMaps maps{};
  if (context.queue) {
    maps.a = mapOf(g.a, g.M, g.K, kTileM);
    maps.b = mapOfB(g.b, g.K);
    if (g.extra.K > 0) {
      maps.extraA = mapOf(g.extra.a, g.M, g.extra.K, kTileM);
      maps.extraB = mapOfB(g.extra.b, g.extra.K);
    }
  }
  launch(context, wideKernel<T, Out, form, tileN>, std::min<int64_t>(tiles, context.device->multiprocessors),
         kThreadsOfBlock, sharedBytes, g, maps);
}

int64_t tilesOf(int64_t M, int64_t N, int64_t tileN) { return (M + kTileM - 1) / kTileM * ((N + tileN - 1) / tileN); }

/// What tiles of that width take; half as wide a tile takes a little more than half the time.
int64_t costOf(const Context& context, int64_t tiles, int64_t tileN) {
  const int64_t multiprocessors = context.device->multiprocessors;
  return (tiles + multiprocessors - 1) / multiprocessors * (tileN == 128 ? 11 : 20);
}

template <class T, class Out, GemmForm form>
void launchForm(Context& context, const Gemm& g) {
  const int64_t narrow = tilesOf(g.M, g.N, 128), wide = tilesOf(g.M, g.N, 256);
  if (costOf(context, narrow, 128) < costOf(context, wide, 256)) {
    return launchWide<T, Out, form, 128>(context, g, narrow);
  }
  launchWide<T, Out, form, 256>(context, g, wide);
}

}  // namespace

bool isWide(const Context& context, const Gemm& g) {
  return hasWgmma(context) && g.form != GemmForm::tn && g.M > kWideRows && g.N >= kBoxColumns && g.K > 0;
}

int64_t wideCost(const Context& context, int64_t M, int64_t N) {
  return std::min(costOf(context, tilesOf(M, N, 128), 128), costOf(context, tilesOf(M, N, 256), 256));
}

void gemmWide(Context& context, const Gemm& g) {
  dispatchFloat(g.compute, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const bool isNt = g.form == GemmForm::nt;
      if (g.out.dtype == DType::f32) {
        (isNt ? launchForm<T, float, GemmForm::nt> : launchForm<T, float, GemmForm::nn>)(context, g);
      } else {
        (isNt ? launchForm<T, T, GemmForm::nt> : launchForm<T, T, GemmForm::nn>)(context, g);
      }
    }
  });
}

}  // namespace qlora::cuda
