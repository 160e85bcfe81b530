// y = x W^T of few tokens: all that costs is reading W, so that decoding must not cost more.
//
// The 16 x 16 operand of an mma is W, the 16 x 8 one has the tokens: up to 8 cost what one does. Which k an mma
// multiplies is free, if both operands agree. So a unit of a row (64 weights of 4 bits, 32 of 16) is cut into four
// shares, that lie one behind the other, for the four lanes that hold a row's elements: lane 4 g + c has share c of
// rows g, g + 8, ..., of a tile, and of token g.
//
// Decoding. A table in shared memory has for each byte the two elements of T that its codes stand for, once for each
// lane, so that 32 lanes read 32 banks: two weights for a shift, a mask and a load. No unit crosses a block of
// quantization; its products are summed by themselves and then multiplied by the absmax, once for 64 weights.
//
// Reading. At 2.8 TB/s and a latency of a microsecond some 25 KB of W must be on their way to each of 132
// multiprocessors, at all times. So each block owns some of the rows, for the whole of K, and goes over them in tiles;
// its warps take turns at chunks of K. Once a warp has consumed a unit, it loads the same one of its next chunk to the
// same registers, be it of the next tile. Thus what is on its way is all registers have room for, and begins before
// anything else does. Rows are dealt evenly to as many blocks as the GPU holds, whatever N: where a tile has fewer rows
// than an mma, the others repeat the last, which costs no memory. x comes from the first cache, where W leaves it.
#include <cstdlib>

#include "cuda/gemm.h"
#include "cuda/mma.h"

namespace qlora::cuda {

namespace {

template <int tiles, int w, int b, bool hint>
struct FewShape {
  static constexpr int rowTiles = tiles;       // of 16 rows, that share what is loaded of x
  static constexpr int warps = w, blocks = b;  // at most: of a block, of a multiprocessor
  static constexpr bool ahead = hint;
  static constexpr int tileRows = 16 * tiles;
  static constexpr int sumStride = tileRows + 4;  // of a token's sums: lanes write them to different banks
};
constexpr int kFewestRows = 8;  // of a block
constexpr int kTableBytes = 256 * kWarpSize * 4;
constexpr int kNested = 256;

/// Rows of 4 bits, blocks of at least kUnit weights.
template <class T, int unit>
struct FourBitRows {
  using Element = T;
  static constexpr bool isScaled = true;
  static constexpr int kUnit = unit, kUnits = 4, kWords = unit / 32, kUnitBytes = unit / 2;
  static constexpr size_t sharedBytes = kTableBytes + kNested * sizeof(float);

  /// Of one unit of a row: lane c of four has that of unit c of a chunk.
  struct Scale {
    float absmax;
    uint32_t index;
  };

  const Elements& b;
  // A plain absmax is a nested one of blocks of one, whose code is 1.
  const float *absmax, *nestedCode;
  int nestedShift;
  float offset;
  const SharedWords table;  // of this lane

  QLORA_DEVICE FourBitRows(const Elements& b, unsigned char* shared)
      : b(b),
        absmax(b.scales.absmax ? b.scales.absmax : b.scales.nestedAbsmax),
        nestedCode(reinterpret_cast<const float*>(shared + kTableBytes)),
        nestedShift(b.scales.absmax ? 0 : kNestedShift),
        offset(b.scales.absmax ? 0 : b.scales.offset),
        table(shared + 4 * laneIndex()) {}

  QLORA_DEVICE void fillShared(unsigned char* shared) const {
    for (int byte = static_cast<int>(threadIdx.x); byte < 256; byte += static_cast<int>(blockDim.x)) {
      // The even element of a byte is in its upper nibble.
      const uint32_t pair =
          uint32_t{fromFloat<T>(b.code[byte >> 4]).bits} | uint32_t{fromFloat<T>(b.code[byte & 15]).bits} << 16;
      auto* copies = reinterpret_cast<uint4*>(shared) + 8 * byte;
#pragma unroll
      for (int i = 0; i < 8; ++i) copies[(i + byte) % 8] = make_uint4(pair, pair, pair, pair);
      reinterpret_cast<float*>(shared + kTableBytes)[byte] = b.scales.absmax ? 1 : b.scales.nestedCode[byte];
    }
  }

  QLORA_DEVICE const uint8_t* at(int64_t element) const { return static_cast<const uint8_t*>(b.data) + (element >> 1); }
  QLORA_DEVICE Scale scaleAt(int64_t element) const {
    const auto block = static_cast<uint32_t>(element >> b.blockShift);
    return {absmax[block >> nestedShift], b.scales.absmax ? 0u : b.scales.index[block]};
  }
  QLORA_DEVICE float valueOf(const Scale& s) const { return nestedCode[s.index] * s.absmax + offset; }

  /// Elements 2 i and 2 i + 1 of a share.
  QLORA_DEVICE uint32_t pair(const uint32_t (&share)[kWords], int i) const {
    return table[4 * kWarpSize * __byte_perm(share[i / 4], 0, 0x4440 + i % 4)];
  }
};

/// Rows of T.
template <class T>
struct DenseRows {
  using Element = T;
  static constexpr bool isScaled = false;
  static constexpr int kUnit = 32, kUnits = 2, kWords = 4, kUnitBytes = 2 * kUnit;
  static constexpr size_t sharedBytes = 0;
  struct Scale {};

  const Elements& b;

  QLORA_DEVICE DenseRows(const Elements& b, unsigned char*) : b(b) {}
  QLORA_DEVICE void fillShared(unsigned char*) const {}
  QLORA_DEVICE const uint8_t* at(int64_t element) const {
    return reinterpret_cast<const uint8_t*>(static_cast<const T*>(b.data) + element);
  }
  QLORA_DEVICE Scale scaleAt(int64_t) const { return {}; }
  QLORA_DEVICE float valueOf(Scale) const { return 1; }
  QLORA_DEVICE uint32_t pair(const uint32_t (&share)[kWords], int i) const { return share[i]; }
};

/// The extra product of one element of C, operands rounded to T.
template <class T>
QLORA_DEVICE float extraOf(const GemmExtra& extra, int64_t m, int64_t n) {
  float sum = 0;
#pragma unroll 8
  for (int64_t k = 0; k < extra.K; ++k) {
    sum = fmaf(toFloat(fromFloat<T>(extra.a.at(m, k))), toFloat(fromFloat<T>(extra.b.at(n, k))), sum);
  }
  return sum;
}

/// For up to 8 tokenTiles tokens.
template <class Rows, int tokenTiles, class Shape>
__global__ void __launch_bounds__(Shape::warps* kWarpSize, Shape::blocks) fewKernel(Gemm g) {
  constexpr int kRowTiles = Shape::rowTiles, kTileRows = Shape::tileRows, kLaneRows = 2 * kRowTiles;
  constexpr int kSumStride = Shape::sumStride;
  using T = typename Rows::Element;
  constexpr int kUnit = Rows::kUnit, kUnits = Rows::kUnits, kChunk = kUnit * kUnits, kShare = kUnit / 4;
  constexpr int kTokens = 8 * tokenTiles;
  auto* const shared = dynamicShared<unsigned char>();
  auto* const sums = reinterpret_cast<float*>(shared + Rows::sharedBytes);  // [warps, kTokens, kSumStride]
  const int own = laneIndex() / 4, quarter = laneIndex() % 4, warp = warpIndex();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize, K = static_cast<int>(g.K);
  const int steps = (K + warps * kChunk - 1) / (warps * kChunk);  // of a tile
  const auto stride = static_cast<int>(g.b.stride);
  const auto beginRow = static_cast<int>(g.N * blockIdx.x / gridDim.x);
  const auto endRow = static_cast<int>(g.N * (blockIdx.x + 1) / gridDim.x);
  const Rows rows(g.b, shared);

  uint32_t shares[kLaneRows][kUnits][Rows::kWords];
  typename Rows::Scale scales[kLaneRows] = {};
  // Where it loads next, and of that this lane's rows.
  int row = beginRow;
  int step = 0, k = warp * kChunk;
  const uint8_t* from[kLaneRows];
  const auto aim = [&] {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int64_t at = int64_t{min(row + own + 8 * r, endRow - 1)} * stride + k;
      from[r] = rows.at(at + quarter * kShare);
      if (k + quarter * kUnit < K) scales[r] = rows.scaleAt(at + quarter * kUnit);
    }
  };
  const auto load = [&](int u) {
    if (k + u * kUnit >= K || row >= endRow) return;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r)
      loadOnce<Rows::kWords, Shape::ahead>(shares[r][u], from[r] + u * Rows::kUnitBytes);
  };
  aim();
#pragma unroll
  for (int u = 0; u < kUnits; ++u) load(u);
  rows.fillShared(shared);
  syncBlock();

  const T* x[tokenTiles];
#pragma unroll
  for (int t = 0; t < tokenTiles; ++t) {
    // Columns of C beyond M are not looked at.
    x[t] = static_cast<const T*>(g.a.data) + min(int64_t{own + 8 * t}, g.M - 1) * g.a.stride + quarter * kShare;
  }
  float sum[kRowTiles][tokenTiles][4] = {};
  while (row < endRow) {
    const int nowRow = row, nowK = k;
    float scale[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) scale[r] = rows.valueOf(scales[r]);
    if (++step == steps) step = 0, row += kTileRows;
    k = (step * warps + warp) * kChunk;
    if (row < endRow) aim();

#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (nowK + u * kUnit < K) {
        uint4 ofX[tokenTiles][kShare / 8];
#pragma unroll
        for (int t = 0; t < tokenTiles; ++t) {
#pragma unroll
          for (int i = 0; i < kShare / 8; ++i) {
            ofX[t][i] = *reinterpret_cast<const uint4*>(x[t] + nowK + u * kUnit + 8 * i);
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float part[tokenTiles][4] = {};
          auto& to = Rows::isScaled ? part : sum[m];
#pragma unroll
          for (int i = 0; i < kShare / 2; i += 2) {
            const uint32_t a[4] = {rows.pair(shares[2 * m][u], i), rows.pair(shares[2 * m + 1][u], i),
                                   rows.pair(shares[2 * m][u], i + 1), rows.pair(shares[2 * m + 1][u], i + 1)};
#pragma unroll
            for (int t = 0; t < tokenTiles; ++t) {
              const uint4 eight = ofX[t][i / 4];
              const uint32_t b[2] = {i % 4 ? eight.z : eight.x, i % 4 ? eight.w : eight.y};
              mma<T>(to[t], a, b);
            }
          }
          if constexpr (Rows::isScaled) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float of = shuffle(scale[2 * m + h], (laneIndex() & ~3) + u);
#pragma unroll
              for (int t = 0; t < tokenTiles; ++t) {
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; ++e) sum[m][t][e] = fmaf(of, part[t][e], sum[m][t][e]);
              }
            }
          }
        }
      }
      load(u);
    }
    if (step > 0) continue;

    syncBlock();  // the sums of the last tile have been read
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int t = 0; t < tokenTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = 8 * t + 2 * quarter + e % 2;
          sums[(warp * kTokens + token) * kSumStride + 16 * m + own + e / 2 * 8] = sum[m][t][e];
          sum[m][t][e] = 0;
        }
      }
    }
    syncBlock();
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * g.M; i += static_cast<int>(blockDim.x)) {
      const int feature = i % kTileRows, token = i / kTileRows;
      const int n = nowRow + feature;
      if (n >= endRow) continue;
      float all = extraOf<T>(g.extra, token, n);
      for (int w = 0; w < warps; ++w) all += sums[(w * kTokens + token) * kSumStride + feature];
      g.out.store(token, n, all);
    }
  }
}

template <class Rows, int tokenTiles, class Shape>
void launchFew(Context& context, const Gemm& g) {
  constexpr int kChunk = Rows::kUnit * Rows::kUnits;
  const int64_t chunks = (g.K + kChunk - 1) / kChunk, steps = (chunks + Shape::warps - 1) / Shape::warps;
  const int64_t warps = (chunks + steps - 1) / steps;
  const int64_t multiprocessors = context.device->multiprocessors;
  const int64_t blocks =
      std::min(multiprocessors * (Shape::warps * Shape::blocks / warps), (g.N + kFewestRows - 1) / kFewestRows);
  const size_t bytes =
      Rows::sharedBytes + sizeof(float) * static_cast<size_t>(warps) * 8 * tokenTiles * Shape::sumStride;
  launch(context, fewKernel<Rows, tokenTiles, Shape>, blocks, static_cast<unsigned>(warps * kWarpSize), bytes, g);
}

template <class Rows>
void launchTokens(Context& context, const Gemm& g) {
  const char* text = std::getenv("QLORA_FEW");
  const char way = text ? *text : 'a';
  if (g.M <= 8) {
    if (way == 'b') return launchFew<Rows, 1, FewShape<1, 16, 2, false>>(context, g);
    if (way == 'c') return launchFew<Rows, 1, FewShape<2, 16, 1, true>>(context, g);
    if (way == 'd') return launchFew<Rows, 1, FewShape<2, 8, 2, false>>(context, g);
    if (way == 'e') return launchFew<Rows, 1, FewShape<1, 16, 2, true>>(context, g);
    return launchFew<Rows, 1, FewShape<2, 16, 1, false>>(context, g);
  }
  if (g.M <= 16) return launchFew<Rows, 2, FewShape<2, 14, 1, false>>(context, g);
  if (g.M <= 32) return launchFew<Rows, 4, FewShape<2, 8, 1, false>>(context, g);
  return launchFew<Rows, 8, FewShape<2, 8, 1, false>>(context, g);
}

template <class T>
void gemmFewOf(Context& context, const Gemm& g) {
  if (g.b.dtype != DType::u8) return launchTokens<DenseRows<T>>(context, g);
  if (g.b.blockShift == 5) return launchTokens<FourBitRows<T, 32>>(context, g);
  launchTokens<FourBitRows<T, 64>>(context, g);
}

}  // namespace

void gemmFew(Context& context, const Gemm& g) {
  g.compute == DType::bf16 ? gemmFewOf<bf16>(context, g) : gemmFewOf<f16>(context, g);
}

}  // namespace qlora::cuda
