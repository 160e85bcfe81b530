// Products of 16-bit types by matrix instructions.
//
// A block of 256 threads owns a tile of C and goes along K in steps of 64. A step's operands are copied to shared
// memory two steps ahead, asynchronously, into one of three stages (of four, where a step is short). A 4-bit weight is
// copied as it is stored, 32 codes a piece of 16 bytes with its absmax; the thread that copied a piece decodes it
// (nibble_table.h) into one of two decoded tiles while other warps multiply. With one barrier a step:
//
//   barrier                    A of this step and the decoded B of this step are there; the last step has been read
//   begin copying step + 2
//   multiply this step
//   wait for step + 1 to have been copied; decode it
//
// A tile of B holds rows of the weight as they are, so the forward (nt: rows are columns of C) and the backward (nn:
// rows are steps of K) differ only in how fragments are read (tile.h).
//
// The extra product comes first, in the same accumulators, so that dropout can mask it before the main one is added.
// Where C has fewer tiles than a large GPU has room for, K is split; the parts are summed in order by another kernel.
#pragma once

#include "cuda/gemm.h"
#include "cuda/nibble_table.h"
#include "cuda/tile.h"

namespace qlora::cuda {

constexpr int kTileThreads = 256;
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor: one decodes or waits while the other multiplies
constexpr int kStep = 64;         // of K
constexpr int kCodes = 32;        // of 4 bits that a thread decodes at a time: no block ends within

/// Of C: tileM x tileN, by warpsM x warpsN warps. `stages` of a 4-bit B, dense ones have three.
template <int m, int n, int wm, int wn, int s = 3>
struct TileShape {
  static constexpr int tileM = m, tileN = n, warpsM = wm, warpsN = wn, stages = s;
  static constexpr int warpM = m / wm, warpN = n / wn;  // of a warp
  static_assert(wm * wn * kWarpSize == kTileThreads && warpM % 16 == 0 && warpN % 16 == 0);
};
using FewRows = TileShape<16, 128, 1, 8, 4>;
using SmallTile = TileShape<64, 64, 2, 4>;
using LargeTile = TileShape<128, 128, 2, 4>;

/// A part of K.
struct TileSplit {
  int stepsPerPart;
  float* parts;  // [parts, M, N], where there are several
};

template <class Shape, class T, GemmForm form, bool fourBit>
struct Tiles {
  static constexpr bool innerA = form != GemmForm::tn, innerB = form == GemmForm::nt;
  static constexpr int rowsA = innerA ? Shape::tileM : kStep, columnsA = innerA ? kStep : Shape::tileM;
  static constexpr int rowsB = innerB ? Shape::tileN : kStep, columnsB = innerB ? kStep : Shape::tileN;
  static constexpr int stages = fourBit ? Shape::stages : 3;
  static constexpr int pieces = rowsB * columnsB / kCodes;
  static constexpr int m16 = Shape::warpM / 16, n8 = Shape::warpN / 8;

  struct Stage {
    alignas(16) T a[rowsA * columnsA];
    alignas(16) T b[fourBit ? kPiece : rowsB * columnsB];
    uint4 codes[fourBit ? pieces : 1];
    float absmax[fourBit ? pieces : 4];
  };
  struct Shared {
    Stage stage[stages];
    alignas(16) T decoded[fourBit ? 2 : 1][fourBit ? rowsB * columnsB : kPiece];
    alignas(16) float code[16];
  };
  const Gemm& g;
  Shared& shared;
  int64_t firstM, firstN;
  float sum[m16][n8][4];

  QLORA_DEVICE Tiles(const Gemm& g, Shared& shared, int64_t firstM, int64_t firstN)
      : g(g), shared(shared), firstM(firstM), firstN(firstN), sum{} {
    if (fourBit && threadIdx.x < 16) shared.code[threadIdx.x] = g.b.code[threadIdx.x];
  }

  /// Row and 32nd column of a piece: neighbours in a row are of neighbouring threads, and eight threads store to
  /// different banks.
  QLORA_DEVICE static int rowOf(int piece) { return piece / 2 % rowsB; }
  QLORA_DEVICE static int columnOf(int piece) { return (piece % 2 + piece / (2 * rowsB) * 2) * kCodes; }

  QLORA_DEVICE void copyStep(Stage& stage, int64_t k, int64_t K) {
    const T* a = static_cast<const T*>(g.a.data);
    if constexpr (innerA) {
      copyTile<rowsA, columnsA, kTileThreads>(stage.a, a, g.a.stride, firstM, g.M, k, K);
    } else {
      copyTile<rowsA, columnsA, kTileThreads>(stage.a, a, g.a.stride, k, K, firstM, g.M);
    }
    const int64_t firstRow = innerB ? firstN : k, R = innerB ? g.N : K;
    const int64_t firstColumn = innerB ? k : firstN, C = innerB ? K : g.N;
    if constexpr (fourBit) {
      const auto* packed = static_cast<const uint8_t*>(g.b.data);
      for (int p = static_cast<int>(threadIdx.x); p < pieces; p += kTileThreads) {
        const int64_t row = firstRow + rowOf(p), column = firstColumn + columnOf(p);
        const bool valid = row < R && column < C;
        const int64_t at = valid ? row * g.b.stride + column : 0;
        copyAsync16(&stage.codes[p], packed + at / 2, valid);
        copyAsync4(&stage.absmax[p], g.b.scales.absmax + (at >> g.b.blockShift), valid);
      }
    } else {
      copyTile<rowsB, columnsB, kTileThreads>(stage.b, static_cast<const T*>(g.b.data), g.b.stride, firstRow, R,
                                              firstColumn, C);
    }
  }

  /// The pieces that this thread copied.
  QLORA_DEVICE void decodeStep(const Stage& stage, T* tile) {
    for (int p = static_cast<int>(threadIdx.x); p < pieces; p += kTileThreads) {
      const NibbleTable<T> table(shared.code, stage.absmax[p]);
      const uint4 codes = stage.codes[p];
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t weights[4];
        table.decode(words[i], weights);
        *reinterpret_cast<uint4*>(tile + place<rowsB, columnsB>(rowOf(p), columnOf(p) / kPiece + i)) =
            make_uint4(weights[0], weights[1], weights[2], weights[3]);
      }
    }
  }

  QLORA_DEVICE int warpFirstM() const { return warpIndex() / Shape::warpsN * Shape::warpM; }
  QLORA_DEVICE int warpFirstN() const { return warpIndex() % Shape::warpsN * Shape::warpN; }

  /// sum += a b.
  QLORA_DEVICE void multiply(const T* a, const T* b, int depth = kStep) {
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      if (k >= depth) break;
      uint32_t ofA[m16][4], ofB[n8 / 2][4];
#pragma unroll
      for (int i = 0; i < m16; ++i) loadA<rowsA, columnsA, innerA>(ofA[i], a, warpFirstM() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < n8 / 2; ++j) loadB<rowsB, columnsB, innerB>(ofB[j], b, k, warpFirstN() + 16 * j);
#pragma unroll
      for (int i = 0; i < m16; ++i) {
#pragma unroll
        for (int j = 0; j < n8; ++j) {
          const uint32_t own[2] = {ofB[j / 2][j % 2 * 2], ofB[j / 2][j % 2 * 2 + 1]};
          mma<T>(sum[i][j], ofA[i], own);
        }
      }
    }
  }

  /// Calls f(m, n, sum) for each of this thread's elements of C.
  template <class F>
  QLORA_DEVICE void forEach(F&& f) {
    const int row = laneIndex() / 4, column = laneIndex() % 4 * 2;
#pragma unroll
    for (int i = 0; i < m16; ++i) {
#pragma unroll
      for (int j = 0; j < n8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t m = firstM + warpFirstM() + 16 * i + row + e / 2 * 8;
          const int64_t n = firstN + warpFirstN() + 8 * j + column + e % 2;
          if (m < g.M && n < g.N) f(m, n, sum[i][j][e]);
        }
      }
    }
  }

  QLORA_DEVICE void addExtra() {
    T* a = shared.stage[0].a;
    T* b = fourBit ? shared.decoded[0] : shared.stage[0].b;
    const int64_t K = g.extra.K;
    for (int64_t k = 0; k < K; k += kStep) {
      fillTile<rowsA, columnsA, kTileThreads>(a, g.extra.a, innerA ? firstM : k, innerA ? g.M : K, innerA ? k : firstM,
                                              innerA ? K : g.M);
      fillTile<rowsB, columnsB, kTileThreads>(b, g.extra.b, innerB ? firstN : k, innerB ? g.N : K, innerB ? k : firstN,
                                              innerB ? K : g.N);
      syncBlock();
      multiply(a, b, static_cast<int>(min(int64_t{kStep}, K - k)));
      syncBlock();
    }
    if (g.extra.dropout.p > 0) {
      forEach(
          [&](int64_t m, int64_t n, float& value) { value *= dropoutFactor(g.extra.dropout, g.extra.maskAt(m, n)); });
    }
  }

  QLORA_DEVICE void addMain(int firstStep, int endStep) {
    const auto stageOf = [&](int step) -> Stage& { return shared.stage[step % stages]; };
    const auto copy = [&](int step) {
      if (step < endStep) copyStep(stageOf(step), int64_t{step} * kStep, g.K);
      commitCopies();
    };
    const auto decode = [&](int step) {
      waitForCopies<stages - 2>();
      if constexpr (fourBit) {
        if (step < endStep) decodeStep(stageOf(step), shared.decoded[step % 2]);
      }
    };
    for (int i = 0; i < stages - 1; ++i) copy(firstStep + i);
    syncBlock();  // shared.code
    decode(firstStep);
    for (int step = firstStep; step < endStep; ++step) {
      syncBlock();
      copy(step + stages - 1);
      multiply(stageOf(step).a, fourBit ? shared.decoded[step % 2] : stageOf(step).b);
      decode(step + 1);
    }
  }
};

template <class Shape, class T, GemmForm form, bool fourBit>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce) tilesKernel(Gemm g, TileSplit split) {
  using Own = Tiles<Shape, T, form, fourBit>;
  Own tiles(g, *dynamicShared<typename Own::Shared>(), int64_t{blockIdx.x} * Shape::tileM,
            int64_t{blockIdx.y} * Shape::tileN);
  const int part = static_cast<int>(blockIdx.z), steps = static_cast<int>((g.K + kStep - 1) / kStep);
  if (part == 0 && g.extra.K > 0) tiles.addExtra();
  tiles.addMain(min(steps, part * split.stepsPerPart), min(steps, (part + 1) * split.stepsPerPart));
  if (split.parts) {
    float* own = split.parts + int64_t{part} * g.M * g.N;
    tiles.forEach([&](int64_t m, int64_t n, float value) { own[m * g.N + n] = value; });
  } else {
    tiles.forEach([&](int64_t m, int64_t n, float value) { g.out.store(m, n, value); });
  }
}

/// g on tiles; operands are of the compute type, or B is 4-bit with absmax in fp32. For each form a file.
void tilesNt(Context& context, const Gemm& g, const TileSplit& split, int64_t parts);
void tilesNn(Context& context, const Gemm& g, const TileSplit& split, int64_t parts);
void tilesTn(Context& context, const Gemm& g, const TileSplit& split, int64_t parts);

template <class Shape, class T, GemmForm form, bool fourBit>
void launchShape(Context& context, const Gemm& g, const TileSplit& split, int64_t parts) {
  const dim3 grid(static_cast<unsigned>((g.M + Shape::tileM - 1) / Shape::tileM),
                  static_cast<unsigned>((g.N + Shape::tileN - 1) / Shape::tileN), static_cast<unsigned>(parts));
  launch(context, tilesKernel<Shape, T, form, fourBit>, grid, kTileThreads,
         sizeof(typename Tiles<Shape, T, form, fourBit>::Shared), g, split);
}

template <class T, GemmForm form, bool fourBit>
void launchTiles(Context& context, const Gemm& g, const TileSplit& split, int64_t parts) {
  if (g.M <= FewRows::tileM) return launchShape<FewRows, T, form, fourBit>(context, g, split, parts);
  // 7.5 has shared memory for the smaller tiles only.
  if (g.M > SmallTile::tileM && g.N > SmallTile::tileN && capabilityOf(context) >= 80) {
    return launchShape<LargeTile, T, form, fourBit>(context, g, split, parts);
  }
  launchShape<SmallTile, T, form, fourBit>(context, g, split, parts);
}

}  // namespace qlora::cuda
