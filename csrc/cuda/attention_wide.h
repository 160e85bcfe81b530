// What attention's kernels for many rows are made of (attention_wide_forward.cu, attention_wide_backward.cu): 16-bit
// types, heads of up to 128 elements, compute capability 8.0 and above. attention_tiles.h says what rows are, and has
// the kernels' plainer siblings for all else.
//
// A block of 256 threads owns 128 rows (or keys), 16 a warp, and visits tiles of keys (or rows). Each visited tile is
// copied asynchronously while the one before is used, into another of two or three stages; one barrier a tile says both
// that a tile has arrived and that the stage which is copied to next has been read. Tiles lie as tile.h says. The two
// products of attention_tiles.h are begun here and may go on beside what the threads do next, until waitForGroups:
//
//   beginTransposed   c = A B^T, both from shared memory
//   beginByWeights    c += P B, P from registers, in words as mma wants its A
//
// On compute capability 9.0 they are of wgmma: a group of four warps has 64 rows. It reads B once for all of them, as
// mma does for 16, for which shared memory is not fast enough there. Elsewhere they are of mma, and done at once.
// A lane has the same elements of c either way: rows g and g + 8 of its warp's 16, columns t and t + 1 of each 8.
//
// nvcc keeps products going beside other work only where it sees which registers they use till when: their sums are
// not touched by anything else between the first product and the wait for the last; and a loop that leaves one under
// way is entered for sure (if, do, while), the wait being in the same branch. Else it waits for each product (C7515).
//
// What a row sees are the keys [low, high), and what sees a key are such rows, but for segments. So only tiles that a
// bound goes through look at single elements.
#pragma once

#include "cuda/attention_tiles.h"
#include "cuda/tile.h"
#include "cuda/wgmma.h"

namespace qlora::cuda::attention {

constexpr int kWideThreads = 256, kWideOwned = 128;

/// Whether the kernels for many rows take a call.
inline bool isWide(const Context& context, DType dtype, int64_t D, int64_t rows) {
  return capabilityOf(context) >= 80 && dtype != DType::f32 && D <= 128 && D % kPiece == 0 && rows > kFewRows;
}

/// Enqueues the forward; parts as attention_forward.cu makes them.
template <class T>
void forwardWide(Context& context, const Problem<T>& a, const Parts& parts, int64_t B, T* out, float* logSumExp);

/// Enqueues the backward, after the rows' statistics.
template <class T>
void backwardWide(Context& context, const Problem<T>& a, const Gradients<T>& g, int64_t B);

/// Blocks of 128 rows (or keys) of all pairs: the key heads of a batch row side by side, as they finish together and
/// leave no long blocks to the end.
inline dim3 wideGrid(int64_t blocks, int64_t Hkv, int64_t B) {
  return dim3(static_cast<unsigned>(blocks * Hkv), static_cast<unsigned>(B));
}
QLORA_DEVICE int wideHead(int Hkv) { return static_cast<int>(blockIdx.x) % Hkv; }
QLORA_DEVICE int wideBlock(int Hkv) { return static_cast<int>(blockIdx.x) / Hkv; }

/// Calls f with the padded head size and whether the device has wgmma, as types.
template <class F>
void dispatchWide(const Context& context, int64_t D, F&& f) {
  const auto withSize = [&](auto size) {
    if (hasWgmma(context)) return f(size, std::true_type{});
    f(size, std::false_type{});
  };
  if (D <= 64) return withSize(std::integral_constant<int, 64>{});
  withSize(std::integral_constant<int, 128>{});
}

/// Shared memory as a T, which begins where wgmma wants it to; the launch gives wideBytes<T>.
template <class T>
QLORA_DEVICE T& wideShared() {
  auto* bytes = dynamicShared<unsigned char>();
  return *reinterpret_cast<T*>(bytes + (alignof(T) - sharedAddress(bytes) % alignof(T)) % alignof(T));
}
template <class T>
constexpr size_t wideBytes = sizeof(T) + (alignof(T) > 128 ? alignof(T) - 128 : 0);

/// Begins to copy a tile: row r from at(r), zeros where that is null.
template <int kRows, int kD, class T, class At>
QLORA_DEVICE void copyRows(T* tile, int D, At&& at) {
  constexpr int kPieces = kD / kPiece;
  static_assert(kRows * kPieces % kWideThreads == 0 && kWideThreads % kPieces == 0);
  const int piece = static_cast<int>(threadIdx.x) % kPieces, d = piece * kPiece;
#pragma unroll
  for (int first = 0; first < kRows; first += kWideThreads / kPieces) {
    const int row = first + static_cast<int>(threadIdx.x) / kPieces;
    const T* from = at(row);
    copyAsync16(tile + place<kRows, kD>(row, piece), from + d, from != nullptr && d < D);
  }
}

/// The same of `rows` rows that are `stride` apart.
template <int kRows, int kD, class T>
QLORA_DEVICE void copyRows(T* tile, int D, const T* from, int64_t stride, int rows) {
  constexpr int kPieces = kD / kPiece, kStep = kWideThreads / kPieces;
  const int own = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const int end = piece * kPiece < D ? rows - own : 0;
  from += own * stride + piece * kPiece;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    copyAsync16(tile + place<kRows, kD>(row + own, piece), from, row < end);
    from += kStep * stride;
  }
}

/// By how much the query and the head of a row change from one row that a thread copies to its next.
template <int kD>
struct RowSteps {
  int query, head;
  QLORA_DEVICE explicit RowSteps(int group)
      : query(kWideThreads * kPiece / kD / group), head(kWideThreads * kPiece / kD % group) {}
};

/// The same of rows [r0, last) of two tensors like q.
template <int kRows, int kD, class T>
QLORA_DEVICE void copyRows(T* tileA, T* tileB, const T* a, const T* b, const Pair& pair, const RowSteps<kD>& steps,
                           int r0, int last) {
  constexpr int kPieces = kD / kPiece, kStep = kWideThreads / kPieces;
  const int own = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const int end = piece * kPiece < pair.D ? last - r0 - own : 0;
  int query = (r0 + own) / pair.group, head = (r0 + own) % pair.group;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    const int64_t at = pair.firstQuery + query * pair.queryStride + head * pair.D + piece * kPiece;
    copyAsync16(tileA + place<kRows, kD>(row + own, piece), a + at, row < end);
    copyAsync16(tileB + place<kRows, kD>(row + own, piece), b + at, row < end);
    query += steps.query;
    head += steps.head;
    if (head >= pair.group) {
      head -= pair.group;
      ++query;
    }
  }
}

/// c = A B^T, of tiles [kRowsA, kD] and [8 blocks, kD].
template <bool groups, int kRowsA, int kD, class T, int blocks>
QLORA_DEVICE void beginTransposed(float (&c)[blocks][4], const T* a, const T* b) {
  if constexpr (groups && kHasWgmma) {
    beginGroup();
    const T* own = a + warpIndex() / 4 * kGroupRows * 64;
    multiplyGroup<T, true, true>(c, GroupOperand<true>{own}, GroupOperand<true>{b});
#pragma unroll
    for (int k = 16; k < kD; k += 16) {
      multiplyGroup<T, true>(c, GroupOperand<true>{own, 0, (k / 64 * kRowsA * 64 + k % 64) * 2},
                             GroupOperand<true>{b, 0, (k / 64 * blocks * 8 * 64 + k % 64) * 2});
    }
    commitGroup();
  } else {
#pragma unroll
    for (auto& block : c) {
#pragma unroll
      for (float& sum : block) sum = 0;
    }
#pragma unroll
    for (int k = 0; k < kD; k += 16) {
      uint32_t ofA[4], ofB[4];
      loadA<kRowsA, kD, true>(ofA, a, 16 * warpIndex(), k);
#pragma unroll
      for (int n = 0; n < blocks; n += 2) {
        loadB<8 * blocks, kD, true>(ofB, b, k, 8 * n);
        mma<T>(c[n], ofA, {ofB[0], ofB[1]});
        mma<T>(c[n + 1], ofA, {ofB[2], ofB[3]});
      }
    }
  }
}

/// c += P B, of a tile [16 steps, 8 blocks].
template <bool groups, class T, int steps, int blocks>
QLORA_DEVICE void beginByWeights(float (&c)[blocks][4], const uint32_t (&p)[steps][4], const T* b) {
  constexpr int kRows = 16 * steps, kD = 8 * blocks;
  if constexpr (groups && kHasWgmma) {
    beginGroup();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      multiplyGroup<T, false>(c, p[k], GroupOperand<false>{b, kRows * 128, k * 16 * 64 * 2});
    }
    commitGroup();
  } else {
#pragma unroll
    for (int k = 0; k < steps; ++k) {
#pragma unroll
      for (int n = 0; n < blocks; n += 2) {
        uint32_t ofB[4];
        loadB<kRows, kD, false>(ofB, b, 16 * k, 8 * n);
        mma<T>(c[n], p[k], {ofB[0], ofB[1]});
        mma<T>(c[n + 1], p[k], {ofB[2], ofB[3]});
      }
    }
  }
}

/// Products as the A of the next.
template <class T, int steps, int blocks>
QLORA_DEVICE void packWeights(uint32_t (&words)[steps][4], const float (&p)[blocks][4]) {
  static_assert(blocks == 2 * steps);
#pragma unroll
  for (int k = 0; k < steps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&from)[4] = p[2 * k + i / 2];
      words[k][i] = packWord<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
  }
}

/// Stores factor x c by way of the warp's own rows of a tile, which nobody reads any more: row r to at(r), if not null.
template <int kD, class T, int blocks, class At>
QLORA_DEVICE void storeRows(T* tile, int D, const float (&c)[blocks][4], const float (&factor)[2], At&& at) {
  static_assert(kD == 8 * blocks);
  constexpr int kPieces = kD / kPiece;
  const int first = 16 * warpIndex(), lane = laneIndex();
#pragma unroll
  for (int n = 0; n < blocks; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* to = tile + place<kWideOwned, kD>(first + lane / 4 + 8 * h, n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = packWord<T>(c[n][2 * h] * factor[h], c[n][2 * h + 1] * factor[h]);
    }
  }
  syncWarp();
  const int piece = lane % kPieces;
#pragma unroll
  for (int row = first + lane / kPieces; row < first + 16; row += kWarpSize / kPieces) {
    T* to = at(row);
    if (to == nullptr || piece * kPiece >= D) continue;
    storePack<kPiece>(to + piece * kPiece, loadPack<kPiece>(tile + place<kWideOwned, kD>(row, piece)));
  }
}

/// 2^x within some units in the last place; 0 below 2^-126.
QLORA_DEVICE float exp2Fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0.0f : exp2f(x);
#endif
}

/// What x is made by comes before what follows. The compiler would else move a wait for products up to where they were
/// begun, and what is to go beside them behind it; it moves no wait over a store, even though x is never -0.
QLORA_DEVICE void beforeWaiting(uint32_t x, [[maybe_unused]] void* shared) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0x80000000; @p st.shared.u32 [%1], %0; }" ::"r"(x),
               "r"(sharedAddress(shared))
               : "memory");
#else
  static_cast<void>(x);
#endif
}

/// Which of the visited a lane's two rows (or keys) see (or are seen by).
struct Sight {
  int low[2], high[2], segment[2];
  const int32_t* ids;  // of the visited, `perId` of them each; null without
  int perId;

  QLORA_DEVICE static Sight ofRows(const Pair& pair, int row, int last) {
    Sight sight{{}, {}, {}, pair.keySegments, 1};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Seer seer = pair.seer(row + 8 * h);
      sight.low[h] = pair.window ? max(0, seer.position - pair.window + 1) : 0;
      sight.high[h] = pair.causal ? min(last, seer.position + 1) : last;
      sight.segment[h] = seer.segment;
    }
    return sight;
  }
  QLORA_DEVICE static Sight ofKeys(const Pair& pair, int key, int keys, int last) {
    Sight sight{{}, {}, {}, pair.querySegments, pair.group};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = key + 8 * h;
      sight.low[h] = pair.firstRow(own);
      sight.high[h] = min(last, pair.lastRow(own + 1));
      sight.segment[h] = pair.keySegments && own < keys ? pair.keySegments[own] : 0;
    }
    return sight;
  }

  /// Calls f(block, element) for those of a tile from `first` on that are not seen.
  template <int blocks, class F>
  QLORA_DEVICE void forEachUnseen(int first, F&& f) const {
    uint32_t unseen[(blocks + 7) / 8];
#pragma unroll
    for (int word = 0; word < (blocks + 7) / 8; ++word) {
      unseen[word] = 0;
#pragma unroll 1
      for (int n = 0; n < 8; ++n)
        unseen[word] |= unseenOf(first + 8 * (8 * word + n) + 2 * (laneIndex() % 4)) << (4 * n);
    }
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (unseen[n / 8] >> (n % 8 * 4 + e) & 1) f(n, e);
      }
    }
  }

 private:
  /// A bit for each element of a block: of both rows, at `at` and one further.
  QLORA_DEVICE uint32_t unseenOf(int at) const {
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int visited = at + e % 2, h = e / 2;
      bool seen = visited >= low[h] && visited < high[h];
      if (seen && ids) seen = segment[h] >= 0 && ids[visited / perId] == segment[h];
      bits |= static_cast<uint32_t>(!seen) << e;
    }
    return bits;
  }
};

}  // namespace qlora::cuda::attention
