// C = A B for matrices of T that lie in memory in either order, with sums in fp32 and what becomes of each sum left to
// the caller. Blocks have 128 x 128 of C, 8 warps of 64 x 32; slices of A and B along K come through two buffers of
// shared memory, the next one on its way (cp.async) while one is multiplied. 16-bit types use mma.sync, f32 fmaf in
// the same layout of C (mma.h). Sums run along K in order: no splits, so their bits depend on shapes alone.
//
// Rows of a matrix are `stride` elements apart. Where that is a multiple of 16 bytes, so must the address be, and
// elements up to the stride are read, which must then be 0 beyond the matrix's edge along K. Left out: wgmma, swizzles
// (rows of shared memory are 16 bytes longer instead), splits along K for few tiles.
#pragma once

#include "cuda/device.h"
#include "cuda/mma.h"

namespace qlora::cuda {

/// How a matrix lies: elements next to each other along K, or along C's rows or columns.
enum class Along { k, other };

template <class T, Along along>
struct Factor {
  const T* data;
  int64_t stride;
};

namespace product {

constexpr int kTile = 128, kThreadsOfBlock = 256;
template <class T>
constexpr int kDepth = sizeof(T) == 4 ? 16 : 32;  // of a slice
/// In f32, so many slices have sums of their own, since sums of 100,000 terms would lose digits. 0 for 16-bit types,
/// whose rounding is coarser than that.
template <class T>
constexpr int kPartial = sizeof(T) == 4 ? 8 : 0;

template <class T, Along along>
struct SliceShape {
  static constexpr int kRows = along == Along::k ? kTile : kDepth<T>, kColumns = along == Along::k ? kDepth<T> : kTile;
  static constexpr int kStride = kColumns + kPack<T>, kSize = kRows * kStride;
};

/// The slice of `extent` x K from (first, k) on; zeros beyond the edges.
template <class T, Along along>
QLORA_DEVICE void loadSlice(T* slice, const Factor<T, along>& from, int64_t extent, int64_t K, int64_t first,
                            int64_t k) {
  using Shape = SliceShape<T, along>;
  const bool rowsAreK = along != Along::k;
  const int64_t rows = rowsAreK ? K : extent, columns = rowsAreK ? extent : K;
  const int64_t r0 = rowsAreK ? k : first, c0 = rowsAreK ? first : k;
  if (from.stride % kPack<T> == 0) {
    constexpr int kPacks = Shape::kColumns / kPack<T>;
    for (int p = static_cast<int>(threadIdx.x); p < Shape::kRows * kPacks; p += kThreadsOfBlock) {
      const int r = p / kPacks, c = p % kPacks * kPack<T>;
      copyAsync16(slice + r * Shape::kStride + c, from.data + (r0 + r) * from.stride + c0 + c,
                  r0 + r < rows && c0 + c < columns);
    }
  } else {
    for (int e = static_cast<int>(threadIdx.x); e < Shape::kRows * Shape::kColumns; e += kThreadsOfBlock) {
      const int r = e / Shape::kColumns, c = e % Shape::kColumns;
      const bool inside = r0 + r < rows && c0 + c < columns;
      slice[r * Shape::kStride + c] = inside ? from.data[(r0 + r) * from.stride + c0 + c] : T{};
    }
  }
}

/// Where element (i along C's rows or columns, k) lies in a slice.
template <class T, Along along>
QLORA_DEVICE int placeInSlice(int i, int k) {
  constexpr int kStride = SliceShape<T, along>::kStride;
  return along == Along::k ? i * kStride + k : k * kStride + i;
}

/// c += the product of a slice: rows from m on, columns from n on.
template <class T, Along alongA, Along alongB>
QLORA_DEVICE void multiplySlice(float (&c)[4][4][4], const T* a, const T* b, int m, int n) {
  const int lane = laneIndex();
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int k = 0; k < kDepth<T>; ++k) {
      float left[4][2], right[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          left[i][h] = a[placeInSlice<T, alongA>(m + 16 * i + 8 * h + g, k)];
          right[i][h] = b[placeInSlice<T, alongB>(n + 8 * i + t + h, k)];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) c[i][j][e] = fmaf(left[i][e / 2], right[j][e % 2], c[i][j][e]);
        }
      }
    }
  } else {
    // Of the four 8 x 8 matrices that a load gives, which lane points where: mma.h has the order.
    const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t af[4][4], bf[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (alongA == Along::k) {
          loadMatrices<false>(af[i], a + placeInSlice<T, alongA>(m + 16 * i + low + second, k + third));
        } else {
          loadMatrices<true>(af[i], a + placeInSlice<T, alongA>(m + 16 * i + second, k + low + third));
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (alongB == Along::k) {
          loadMatrices<false>(bf[j], b + placeInSlice<T, alongB>(n + 16 * j + low + third, k + second));
        } else {
          loadMatrices<true>(bf[j], b + placeInSlice<T, alongB>(n + 16 * j + third, k + low + second));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(c[i][j], af[i], {bf[j / 2][j % 2 * 2], bf[j / 2][j % 2 * 2 + 1]});
      }
    }
  }
}

QLORA_DEVICE void moveSums(float (&from)[4][4][4], float (&to)[4][4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[i][j][e] += from[i][j][e];
        from[i][j][e] = 0;
      }
    }
  }
}

template <class T, Along alongA, Along alongB, class Store>
__global__ void __launch_bounds__(kThreadsOfBlock)
    kernel(int64_t M, int64_t N, int64_t K, Factor<T, alongA> a, Factor<T, alongB> b, Store store) {
  constexpr int kSizeA = SliceShape<T, alongA>::kSize, kBuffer = kSizeA + SliceShape<T, alongB>::kSize;
  T* const buffers = dynamicShared<T>();
  const int64_t m0 = int64_t{blockIdx.x} * kTile, n0 = int64_t{blockIdx.y} * kTile;
  const int m = warpIndex() / 4 * 64, n = warpIndex() % 4 * 32;
  const auto load = [&](int64_t slice) {
    T* to = buffers + slice % 2 * kBuffer;
    loadSlice(to, a, M, K, m0, slice * kDepth<T>);
    loadSlice(to + kSizeA, b, N, K, n0, slice * kDepth<T>);
    commitCopies();
  };
  float c[4][4][4] = {}, total[4][4][4] = {};
  const int64_t slices = (K + kDepth<T> - 1) / kDepth<T>;
  load(0);
  for (int64_t slice = 0; slice < slices; ++slice) {
    load(slice + 1);
    waitForCopies<1>();
    syncBlock();
    const T* from = buffers + slice % 2 * kBuffer;
    multiplySlice<T, alongA, alongB>(c, from, from + kSizeA, m, n);
    syncBlock();
    if constexpr (kPartial < T >> 0) {
      if ((slice + 1) % kPartial<T> == 0) moveSums(c, total);
    }
  }
  moveSums(c, total);
  const int64_t row = m0 + m + laneIndex() / 4, column = n0 + n + 2 * (laneIndex() % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t y = row + 16 * i + e / 2 * 8, x = column + 8 * j + e % 2;
        if (y < M && x < N) store(y, x, total[i][j][e]);
      }
    }
  }
}

}  // namespace product

/// store(row, column, sum over k < K of A(row, k) B(k, column)) for each element of M x N, `store` an object with
/// `QLORA_DEVICE void operator()(int64_t, int64_t, float) const`.
template <class T, Along alongA, Along alongB, class Store>
void multiplyTiles(const Context& context, int64_t M, int64_t N, int64_t K, Factor<T, alongA> a, Factor<T, alongB> b,
                   Store store) {
  using namespace product;
  constexpr size_t bytes = 2 * sizeof(T) * (SliceShape<T, alongA>::kSize + SliceShape<T, alongB>::kSize);
  const auto tiles = [](int64_t n) { return static_cast<unsigned>((n + kTile - 1) / kTile); };
  launch(context, kernel<T, alongA, alongB, Store>, dim3(tiles(M), tiles(N)), kThreadsOfBlock, bytes, M, N, K, a, b,
         store);
}

}  // namespace qlora::cuda
