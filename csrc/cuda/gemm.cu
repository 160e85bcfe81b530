// Which kernel a product takes, and what has to be done before and after.

#include "cuda/gemm_tiles.h"

namespace qlora::cuda {

namespace {

// Of a converted B: they stay in the second cache; for gemmWide, that each slice gives all of a large GPU work.
constexpr int64_t kSliceElements = int64_t{16} << 20, kWideSliceElements = int64_t{64} << 20;
constexpr int64_t kSliceColumns = 256;  // a slice has a multiple of them
constexpr int64_t kSplitBlocks = 264;   // two on each multiprocessor of a large GPU
constexpr int64_t kMostRows = int64_t{1} << 30;
constexpr int kMostParts = 16, kFewestSteps = 4;

bool isAligned(const Elements& e) { return reinterpret_cast<uintptr_t>(e.data) % 16 == 0 && e.stride % kPiece == 0; }

bool isOf(const Elements& e, DType compute) { return e.dtype == compute && e.scale == 1; }

/// Whether rows of A and of B can be read in whole pieces of 16 bytes, B of the compute type or of 4 bits.
bool hasPieces(const Gemm& g) {
  const int64_t rowA = g.form == GemmForm::tn ? g.M : g.K, rowB = g.form == GemmForm::nt ? g.K : g.N;
  const int64_t unitB = g.b.dtype == DType::u8 ? kCodes : kPiece;
  const bool alignedB = reinterpret_cast<uintptr_t>(g.b.data) % 16 == 0 || !isOf(g.b, g.compute);
  return isOf(g.a, g.compute) && isAligned(g.a) && rowA % kPiece == 0 && rowB % unitB == 0 && g.b.stride % unitB == 0 &&
         alignedB;
}

/// Few rows of A, and a B whose numbers of rows, columns and blocks 31 bits hold.
bool isFew(const Gemm& g) {
  const int64_t unit = g.b.dtype == DType::u8 ? 64 : 32;
  return g.form == GemmForm::nt && g.M <= kFewRows && g.K % unit == 0 && g.K < kMostRows && g.N < kMostRows &&
         g.N * g.b.stride / kCodes < kMostRows;
}

/// Whether gemm() makes it by gemmFew without converting anything.
bool goesToFew(const Gemm& g) {
  return g.M > 0 && g.N > 0 && g.compute != DType::f32 && hasPieces(g) && isFew(g) &&
         (isOf(g.b, g.compute) || g.b.dtype == DType::u8);
}

bool isOneKind(const Elements& a, const Elements& b) {
  return a.dtype == b.dtype && (a.dtype != DType::u8 || (a.blockShift == 5) == (b.blockShift == 5));
}

__global__ void scalesKernel(int64_t blocks, BlockScales scales, float* absmax) {
  for (int64_t b = threadIndex(); b < blocks; b += threadCount()) absmax[b] = scales[b];
}

/// B with the absmax of its blocks in fp32.
Elements withPlainScales(Context& context, const Gemm& g) {
  Elements b = g.b;
  if (b.dtype != DType::u8 || b.scales.absmax) return b;
  const int64_t elements = (g.form == GemmForm::nt ? g.N : g.K) * b.stride;
  const int64_t blocks = ((elements - 1) >> b.blockShift) + 1;
  auto* absmax = context.scratch.take<float>(blocks);
  launch(context, scalesKernel, blocksFor(blocks), kThreads, 0, blocks, b.scales, absmax);
  b.scales = {absmax, nullptr, nullptr, nullptr, 0};
  return b;
}

/// c from the sums of the parts, in their order; in rows of `pitch`.
__global__ void addPartsKernel(int64_t M, int64_t N, int64_t pitch, int parts, const float* sums, GemmOutput out) {
  for (int64_t i = threadIndex(); i < M * N; i += threadCount()) {
    const int64_t m = i / N, n = i % N;
    float sum = sums[m * pitch + n];
    for (int part = 1; part < parts; ++part) sum += sums[(part * M + m) * pitch + n];
    out.store(m, n, sum);
  }
}

void gemmTiles(Context& context, Gemm g) {
  g.b = withPlainScales(context, g);
  const int steps = static_cast<int>((g.K + kStep - 1) / kStep);
  const bool isSmall = g.M > FewRows::tileM && (g.M <= SmallTile::tileM || g.N <= SmallTile::tileN);
  const int64_t side = isSmall ? SmallTile::tileN : LargeTile::tileN;
  const int64_t tiles = ((g.M + side - 1) / side) * ((g.N + side - 1) / side);
  const int wanted = static_cast<int>(std::min<int64_t>(kMostParts, kSplitBlocks / std::max<int64_t>(tiles, 1)));
  const int most = std::max(1, std::min(wanted, steps / kFewestSteps));
  TileSplit split{(steps + most - 1) / most, nullptr};
  const int parts = split.stepsPerPart > 0 ? (steps + split.stepsPerPart - 1) / split.stepsPerPart : 1;
  if (parts > 1) split.parts = context.scratch.take<float>(parts * g.M * g.N);
  (g.form == GemmForm::nt ? tilesNt : g.form == GemmForm::nn ? tilesNn : tilesTn)(context, g, split, parts);
  if (parts > 1) {
    launch(context, addPartsKernel, blocksFor(g.M * g.N), kThreads, 0, g.M, g.N, g.N, parts, split.parts, g.out);
  }
}

/// Where a converted matrix [rows, columns] comes from, of which element (row, column) it has.
struct Source {
  Elements elements;
  int64_t row = 0, column = 0;
  bool transposed = false;  // (column, row)

  QLORA_DEVICE float at(int64_t r, int64_t c) const {
    return transposed ? elements.at(row + c, column + r) : elements.at(row + r, column + c);
  }
};

/// to [rows, columns], in rows of `pitch`; zeros up to that. 32-bit indices, where all elements have them, divide fast.
template <class T, class Index>
__global__ void convertKernel(Index rows, Index columns, Index pitch, Source from, T* to) {
  const Index n = rows * pitch;
  for (auto i = static_cast<Index>(threadIndex()); i < n; i += static_cast<Index>(threadCount())) {
    const Index row = i / pitch, column = i % pitch;
    to[i] = fromFloat<T>(column < columns ? from.at(row, column) : 0.0f);
  }
}

constexpr int kRowsPerThread = 8;  // of decodeKernel

/// The same of a 4-bit b, eight columns a thread; no block of quantization ends within.
template <class T>
__global__ void decodeKernel(int64_t rows, int64_t columns, Source from, T* to) {
  QLORA_SHARED_ARRAY(float, code, 16);
  QLORA_SHARED_ARRAY(float, nestedCode, 256);
  const Elements& b = from.elements;
  if (threadIdx.x < 16) code[threadIdx.x] = b.code[threadIdx.x];
  if (!b.scales.absmax) nestedCode[threadIdx.x] = b.scales.nestedCode[threadIdx.x];
  syncBlock();
  BlockScales scales = b.scales;
  scales.nestedCode = nestedCode;
  const int64_t column = threadIndex() * kPiece;
  if (column >= columns) return;
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t at = (from.row + row) * b.stride + from.column + column;
    const auto codes = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(b.data) + at / 2);
    const float absmax = scales[at >> b.blockShift];
    Pack<T, kPiece> values;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      // The even element of a byte is in its upper nibble.
      const uint32_t own = codes >> (i % 2 ? 4 * (i - 1) : 4 * (i + 1)) & 15;
      values.value[i] = fromFloat<T>(code[own] * absmax);
    }
    storePack<kPiece>(to + row * columns + column, values);
  }
}

template <class T>
void convert(Context& context, int64_t rows, int64_t columns, int64_t pitch, const Source& from, T* to) {
  if constexpr (sizeof(T) == 2) {
    if (from.elements.dtype == DType::u8) {
      const dim3 grid(static_cast<unsigned>((columns / kPiece + kThreads - 1) / kThreads),
                      static_cast<unsigned>(std::min<int64_t>((rows + kRowsPerThread - 1) / kRowsPerThread, 32768)));
      return launch(context, decodeKernel<T>, grid, kThreads, 0, rows, columns, from, to);
    }
  }
  const int64_t n = rows * pitch;
  if (n < INT32_MAX / 2) {
    launch(context, convertKernel<T, uint32_t>, blocksFor(n), kThreads, 0, rows, columns, pitch, from, to);
  } else {
    launch(context, convertKernel<T, int64_t>, blocksFor(n), kThreads, 0, rows, columns, pitch, from, to);
  }
}

/// A matrix of the compute type whose rows are whole pieces of 16 bytes: that of `from`, or a copy with zeros at their
/// ends.
Elements inPieces(Context& context, const Source& from, int64_t rows, int64_t columns, DType compute) {
  if (isOf(from.elements, compute) && isAligned(from.elements) && !from.transposed) return from.elements;
  const int64_t pitch = (columns + kPiece - 1) / kPiece * kPiece;
  void* to = context.scratch.bytes(static_cast<size_t>(rows * pitch) * sizeOf(compute));
  dispatchFloat(compute, [&](auto zero) {
    using T = decltype(zero);
    convert(context, rows, columns, pitch, from, static_cast<T*>(to));
  });
  return {.data = to, .dtype = compute, .stride = pitch};
}

/// Moves a product's columns on, so that they begin at `first`.
void skipColumns(Gemm& g, int64_t first) {
  const auto move = [&](const void* p, size_t bytes) {
    return p ? static_cast<const char*>(p) + first * bytes : nullptr;
  };
  g.out.c = const_cast<char*>(move(g.out.c, sizeOf(g.out.dtype)));
  g.out.bias = move(g.out.bias, sizeOf(g.out.biasDtype));
  if (g.out.columnScale) g.out.columnScale += first;
  g.out.residual = move(g.out.residual, sizeOf(g.out.dtype));
  if (g.extra.K > 0) {
    const int64_t elements = g.form == GemmForm::nt ? g.extra.b.stride : 1;
    g.extra.b.data = move(g.extra.b.data, sizeOf(g.extra.b.dtype) * static_cast<size_t>(elements));
    g.extra.maskColumn += first;
  }
}

/// How many columns of C at a time B is converted for: of gemmWide those that leave the fewest multiprocessors idle.
int64_t sliceColumns(const Context& context, const Gemm& g) {
  const int64_t depth = std::max<int64_t>(g.K, 1);
  const bool wide = isWide(context, g);
  const int64_t elements = wide ? kWideSliceElements : kSliceElements;
  const int64_t most = std::max(kSliceColumns, elements / depth / kSliceColumns * kSliceColumns);
  if (g.N <= most) return g.N;
  if (!wide) return most;
  int64_t best = most, least = INT64_MAX;
  for (int64_t columns = most; columns > most / 2; columns -= kSliceColumns) {
    const int64_t rest = g.N % columns;
    const int64_t cost =
        g.N / columns * wideCost(context, g.M, columns) + (rest > 0 ? wideCost(context, g.M, rest) : 0);
    if (cost < least) best = columns, least = cost;
  }
  return best;
}

/// B is converted to the compute type, some columns of C at a time.
void gemmConverted(Context& context, const Gemm& g) {
  const bool rowsAreColumns = g.form == GemmForm::nt;
  const int64_t columns = sliceColumns(context, g);
  void* converted = context.scratch.bytes(static_cast<size_t>(columns * g.K) * sizeOf(g.compute));
  for (int64_t first = 0; first < g.N; first += columns) {
    Gemm part = g;
    part.N = std::min(columns, g.N - first);
    skipColumns(part, first);
    const int64_t rows = rowsAreColumns ? part.N : g.K, width = rowsAreColumns ? g.K : part.N;
    part.b = {.data = converted, .dtype = g.compute, .stride = width};
    dispatchFloat(g.compute, [&](auto zero) {
      using T = decltype(zero);
      const Source from{g.b, rowsAreColumns ? first : 0, rowsAreColumns ? 0 : first};
      convert(context, rows, width, width, from, static_cast<T*>(converted));
    });
    gemm(context, part);
  }
}

/// What gemmWide cannot do itself: an extra product that dropout masks, and outputs that take more than storing.
void gemmWideAndRest(Context& context, Gemm g) {
  const GemmExtra extra = g.extra;
  const bool masked = extra.K > 0 && extra.dropout.p > 0;
  if (extra.K > 0 && !masked) {
    const bool rowsAreColumns = g.form == GemmForm::nt;
    g.extra.a = inPieces(context, {extra.a}, g.M, extra.K, g.compute);
    g.extra.b = inPieces(context, {extra.b}, rowsAreColumns ? g.N : extra.K, rowsAreColumns ? extra.K : g.N, g.compute);
  }
  const GemmOutput out = g.out;
  const int64_t unit = out.dtype == DType::f32 ? 2 : kPiece;
  const bool plain = !out.add && !out.bias && !out.rowScale && !out.columnScale && !out.residual &&
                     out.stride % unit == 0 && g.N % unit == 0 && reinterpret_cast<uintptr_t>(out.c) % 16 == 0;
  if (!masked && plain && (out.dtype == DType::f32 ? out.alpha == 1 : out.dtype == g.compute)) {
    return gemmWide(context, g);
  }
  const int64_t pitch = g.N + g.N % 2;
  const int parts = masked ? 2 : 1;
  float* sums = context.scratch.take<float>(parts * g.M * pitch);
  const auto outOf = [&](int part) {
    return GemmOutput{.c = sums + part * g.M * pitch, .dtype = DType::f32, .stride = pitch};
  };
  if (masked) {
    Gemm first = g;
    first.K = 0;
    first.out = outOf(0);
    gemmTiles(context, first);
    g.extra = {};
  }
  g.out = outOf(parts - 1);
  gemmWide(context, g);
  launch(context, addPartsKernel, blocksFor(g.M * g.N), kThreads, 0, g.M, g.N, pitch, parts, sums, out);
}

/// (B A^T)^T, where that has few rows.
bool isThin(const Gemm& g) {
  const GemmOutput& out = g.out;
  return g.form != GemmForm::tn && g.N <= kFewRows && g.M > kFewRows && isOf(g.a, g.compute) && isAligned(g.a) &&
         g.b.dtype != DType::u8 && g.extra.K == 0 && !out.bias && !out.rowScale && !out.columnScale;
}
Gemm transposed(const Gemm& g) {
  Gemm t = g;
  t.form = GemmForm::nt;
  std::swap(t.M, t.N);
  std::swap(t.a, t.b);
  std::swap(t.out.stride, t.out.columnStride);
  return t;
}

}  // namespace

void gemm(Context& context, const Gemm& given) {
  Gemm g = given;
  if (g.M == 0 || g.N == 0) return;
  if (g.compute != DType::f32 && isThin(g) && isFew(transposed(g))) {
    Gemm few = transposed(g);
    few.a = inPieces(context, {.elements = g.b, .transposed = g.form == GemmForm::nn}, g.N, g.K, g.compute);
    return gemmFew(context, &few, 1);
  }
  if (g.extra.maskRow == 0) g.extra.maskRow = g.N;
  if (g.compute == DType::f32 || !hasPieces(g)) return gemmPlain(context, g);
  const bool fourBit = g.b.dtype == DType::u8, wide = isWide(context, g);
  if (!isOf(g.b, g.compute) && (wide || !fourBit)) return gemmConverted(context, g);
  if (wide) return gemmWideAndRest(context, g);
  if (isFew(g)) return gemmFew(context, &g, 1);
  gemmTiles(context, g);
}

void gemms(Context& context, const Gemm* list, int count) {
  bool together = count > 1;
  for (int i = 0; i < count; ++i) together = together && goesToFew(list[i]) && isOneKind(list[i].b, list[0].b);
  if (together) return gemmFew(context, list, count);
  for (int i = 0; i < count; ++i) {
    Scratch scratch = context.scratch.nested();
    Context own{context.pool, scratch, context.queue, context.device};
    gemm(own, list[i]);
  }
}

}  // namespace qlora::cuda
