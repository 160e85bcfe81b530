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
// same registers, be it of the next tile. Thus what is on its way is all registers have room for. It begins early
// (launch.h): while the kernel before it ends, a warp asks the second cache for its first chunks. Rows are dealt evenly
// to as many blocks as the GPU holds, whatever N: where a tile has fewer rows than an mma, the others repeat the last,
// which costs no memory. x comes from the first cache, where W leaves it.
//
// Several products of one x have blocks of their own in one launch, as many as they have of all rows; how sums are made
// follows from the shape of each alone, so that they are those of a launch of its own.
#include "cuda/gemm.h"
#include "cuda/mma.h"

namespace qlora::cuda {

namespace {

template <int tiles, int w, int b>
struct FewShape {
  static constexpr int rowTiles = tiles;       // of 16 rows, that share what is loaded of x
  static constexpr int warps = w, blocks = b;  // at most: of a block, of a multiprocessor
  static constexpr int tileRows = 16 * tiles;
  static constexpr int sumStride = tileRows + 4;  // of a token's sums: lanes write them to different banks
};
constexpr int kFewestRows = 8;  // of a block
constexpr int kAhead = 2;       // chunks that each warp brings to the second cache before it may read them
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

/// How rows and K of a product are dealt to the warps of its blocks.
struct Deal {
  int firstBlock;
  int rowGroupShift;  // log2 of a block's groups of warps that have the same rows
  int groups;         // of warps that share K; those of a block beyond have nothing to do
  int fewest, more;   // rows of a group; so many groups have one more
  int tiles, steps;   // that a warp goes over

  QLORA_DEVICE int rowGroups() const { return 1 << rowGroupShift; }
  /// The first row of a group of a block.
  QLORA_DEVICE int begin(int group) const {
    const int i = ((static_cast<int>(blockIdx.x) - firstBlock) << rowGroupShift) + group;
    return i * fewest + min(i, more);
  }
};

struct Products {
  Gemm products[kMostTogether];
  Deal deals[kMostTogether];
  int count;

  /// The one that this block works for.
  QLORA_DEVICE int own() const {
    int i = count - 1;
    while (static_cast<int>(blockIdx.x) < deals[i].firstBlock) --i;
    return i;
  }
};

/// For up to 8 tokenTiles tokens.
template <class Rows, int tokenTiles, class Shape>
__global__ void __launch_bounds__(Shape::warps* kWarpSize, Shape::blocks) fewKernel(QLORA_GRID_CONSTANT Products all) {
  using T = typename Rows::Element;
  constexpr int kRowTiles = Shape::rowTiles, kTileRows = Shape::tileRows, kLaneRows = 2 * kRowTiles;
  constexpr int kUnit = Rows::kUnit, kUnits = Rows::kUnits, kChunk = kUnit * kUnits, kShare = kUnit / 4;
  const int ownProduct = all.own();
  const Gemm& g = all.products[ownProduct];
  const Deal& deal = all.deals[ownProduct];
  auto* const shared = dynamicShared<unsigned char>();
  auto* const sums = reinterpret_cast<float*>(shared + Rows::sharedBytes);  // [warps, kPassTokens, sumStride]
  const int own = laneIndex() / 4, quarter = laneIndex() % 4, warp = warpIndex();
  const int rowGroup = warp & (deal.rowGroups() - 1), group = warp >> deal.rowGroupShift;
  const int groups = deal.groups;
  const int K = static_cast<int>(g.K), stride = static_cast<int>(g.b.stride);
  const int endRow = deal.begin(group < groups ? rowGroup + 1 : rowGroup);
  const Rows rows(g.b, shared);

  uint32_t shares[kLaneRows][kUnits][Rows::kWords];
  typename Rows::Scale scales[kLaneRows] = {};
  // Where it loads next, and of that this lane's rows.
  int row = deal.begin(rowGroup), step = 0, k = group * kChunk;
  const uint8_t* from[kLaneRows];
  const auto aim = [&] {
    if (row >= endRow) return;
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
    for (int r = 0; r < kLaneRows; ++r) {
      loadOnce<Rows::kWords>(shares[r][u], from[r] + u * Rows::kUnitBytes);
    }
  };
  letNextBegin();
  for (int i = 0; i < kAhead; ++i) {
    const int n = row + laneIndex() + i / deal.steps * kTileRows, at = ((i % deal.steps) * groups + group) * kChunk;
    if (n < endRow && at < K) prefetch(rows.at(int64_t{n} * stride + at));
  }
  waitForEarlier();
  aim();
#pragma unroll
  for (int u = 0; u < kUnits; ++u) load(u);
  rows.fillShared(shared);
  syncBlock();

  const int lastToken = static_cast<int>(g.M) - 1, strideX = static_cast<int>(g.a.stride);
  float sum[kRowTiles][tokenTiles][4] = {};
  for (int tile = 0; tile < deal.tiles;) {
    const bool isOwn = row < endRow;
    const int nowK = k;
    const T* nowX = static_cast<const T*>(g.a.data) + k + quarter * kShare;
    float scale[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) scale[r] = rows.valueOf(scales[r]);
    if (++step == deal.steps) step = 0, row += kTileRows;
    k = (step * groups + group) * kChunk;
    aim();

#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (isOwn && nowK + u * kUnit < K) {
        const auto loadX = [&](int t, uint4(&to)[kShare / 8]) {
          // Columns of C beyond M are not looked at.
          const T* x = nowX + int64_t{min(own + 8 * t, lastToken)} * strideX;
#pragma unroll
          for (int i = 0; i < kShare / 8; ++i) to[i] = *reinterpret_cast<const uint4*>(x + u * kUnit + 8 * i);
        };
        uint4 ofX[2][kShare / 8];
        loadX(0, ofX[0]);
        float ofUnit[kLaneRows];
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          ofUnit[r] = Rows::isScaled ? shuffle(scale[r], (laneIndex() & ~3) + u) : 1.0f;
        }
        uint32_t a[kRowTiles][kShare / 4][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < kShare / 4; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) a[m][i][e] = rows.pair(shares[2 * m + e % 2][u], 2 * i + e / 2);
          }
        }
#pragma unroll
        for (int t = 0; t < tokenTiles; ++t) {
          if (t + 1 < tokenTiles) loadX(t + 1, ofX[(t + 1) % 2]);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            float part[4] = {};
            auto& to = Rows::isScaled ? part : sum[m][t];
#pragma unroll
            for (int i = 0; i < kShare / 4; ++i) {
              const uint4 eight = ofX[t % 2][i / 2];
              const uint32_t b[2] = {i % 2 ? eight.z : eight.x, i % 2 ? eight.w : eight.y};
              mma<T>(to, a[m][i], b);
            }
            if constexpr (Rows::isScaled) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                sum[m][t][e] = fmaf(ofUnit[2 * m + e / 2], part[e], sum[m][t][e]);
              }
            }
          }
        }
      }
      load(u);
    }
    if (step > 0) continue;

    // Some tokens at a time, for which there is shared memory.
    constexpr int kPassTiles = tokenTiles < 2 ? tokenTiles : 2, kPassTokens = 8 * kPassTiles;
#pragma unroll
    for (int pass = 0; pass < tokenTiles; pass += kPassTiles) {
      syncBlock();  // the last sums have been read
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int t = 0; t < kPassTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int token = 8 * t + 2 * quarter + e % 2;
            sums[(warp * kPassTokens + token) * Shape::sumStride + 16 * m + own + e / 2 * 8] = sum[m][pass + t][e];
            sum[m][pass + t][e] = 0;
          }
        }
      }
      syncBlock();
      const int tokens = min(kPassTokens, static_cast<int>(g.M) - 8 * pass);
      for (int i = static_cast<int>(threadIdx.x); i < (kTileRows * tokens) << deal.rowGroupShift;
           i += static_cast<int>(blockDim.x)) {
        const int feature = i % kTileRows, ofGroup = i / kTileRows & (deal.rowGroups() - 1);
        const int token = i / kTileRows >> deal.rowGroupShift, n = deal.begin(ofGroup) + tile * kTileRows + feature;
        if (n >= deal.begin(ofGroup + 1)) continue;
        float total = extraOf<T>(g.extra, 8 * pass + token, n);
        for (int j = 0; j < groups; ++j) {
          const int other = (j << deal.rowGroupShift) + ofGroup;
          total += sums[(other * kPassTokens + token) * Shape::sumStride + feature];
        }
        g.out.store(8 * pass + token, n, total);
      }
    }
    ++tile;
  }
}

int64_t roundedUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// How K is dealt: by shapes alone, as a large GPU has multiprocessors, since sums depend on it.
template <class Rows, class Shape>
Deal dealOf(const Gemm& g) {
  constexpr int64_t kMultiprocessors = 132;
  const int64_t chunks = roundedUp(g.K, Rows::kUnit * Rows::kUnits), rows = roundedUp(g.N, kMultiprocessors);
  // The least work of all warps together; of equal ones the one with the fewest warps that share K.
  int64_t least = INT64_MAX;
  Deal deal{};
  for (int shift = 0; 1 << shift <= Shape::warps; ++shift) {
    const int64_t steps = roundedUp(chunks, Shape::warps >> shift), own = roundedUp(chunks, steps);
    const int64_t work = (roundedUp(roundedUp(rows, 1 << shift), Shape::tileRows) * steps * own) << shift;
    if (work > least) continue;
    least = work;
    deal.rowGroupShift = shift, deal.steps = static_cast<int>(steps), deal.groups = static_cast<int>(own);
  }
  return deal;
}

template <class Rows, int tokenTiles, class Shape>
void launchFew(Context& context, const Gemm* list, int count) {
  Products all{};
  all.count = count;
  int64_t rows = 0, most = 0;
  int warps = 0;
  for (int i = 0; i < count; ++i) {
    all.products[i] = list[i];
    const Deal& deal = all.deals[i] = dealOf<Rows, Shape>(list[i]);
    rows += list[i].N;
    most += roundedUp(list[i].N, kFewestRows << deal.rowGroupShift);
    warps = std::max(warps, deal.groups << deal.rowGroupShift);
  }
  const int64_t blocks = std::min<int64_t>(context.device->multiprocessors * Shape::blocks, most);
  int64_t before = 0, block = 0;
  for (int i = 0; i < count; ++i) {
    Deal& deal = all.deals[i];
    const int64_t N = list[i].N, first = block;
    before += N;
    block = std::max(first + 1, blocks * before / rows);
    const int64_t parts = (block - first) << deal.rowGroupShift;
    deal.firstBlock = static_cast<int>(first);
    deal.fewest = static_cast<int>(N / parts), deal.more = static_cast<int>(N % parts);
    deal.tiles = static_cast<int>(roundedUp(roundedUp(N, parts), Shape::tileRows));
  }
  const size_t bytes =
      Rows::sharedBytes + sizeof(float) * static_cast<size_t>(warps) * 8 * std::min(tokenTiles, 2) * Shape::sumStride;
  launchEarly(context, fewKernel<Rows, tokenTiles, Shape>, block, static_cast<unsigned>(warps * kWarpSize), bytes, all);
}

template <class Rows>
void launchTokens(Context& context, const Gemm* list, int count) {
  const int64_t M = list[0].M;
  if (M <= 8) return launchFew<Rows, 1, FewShape<2, 16, 1>>(context, list, count);
  // 7.5 has no shared memory for a table and the sums of so many warps.
  if (M <= 16 && capabilityOf(context) >= 80) return launchFew<Rows, 2, FewShape<2, 16, 1>>(context, list, count);
  if (M <= 32) return launchFew<Rows, 4, FewShape<2, 8, 1>>(context, list, count);
  launchFew<Rows, 8, FewShape<2, 8, 1>>(context, list, count);
}

template <class T>
void gemmFewOf(Context& context, const Gemm* list, int count) {
  const Elements& b = list[0].b;
  if (b.dtype != DType::u8) return launchTokens<DenseRows<T>>(context, list, count);
  if (b.blockShift == 5) return launchTokens<FourBitRows<T, 32>>(context, list, count);
  launchTokens<FourBitRows<T, 64>>(context, list, count);
}

}  // namespace

void gemmFew(Context& context, const Gemm* list, int count) {
  list[0].compute == DType::bf16 ? gemmFewOf<bf16>(context, list, count) : gemmFewOf<f16>(context, list, count);
}

}  // namespace qlora::cuda
