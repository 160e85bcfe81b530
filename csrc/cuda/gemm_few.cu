// y = x W^T of at most 8 tokens: all that costs is reading W, so that decoding must not cost more.
//
// The 16 x 16 operand of an mma is W, the 16 x 8 one has the tokens: so up to 8 cost what one does, and a weight costs
// its decoding (nibble_table.h) and an eighth of an instruction. A block has 16 features, whose K its 8 warps share in
// chunks; a warp's partial sums are added in order at the end.
//
// Which k an mma multiplies is free, if both operands agree. So a lane takes consecutive elements of its two rows, as
// they lie in 16 bytes, and the same elements of its token: with lane = 4 g + c it has rows g and g + 8 and token g, and
// of a chunk the c-th share of k. Of 4 bits that is a block of 64 weights, for which it makes one table; four lanes read
// 128 bytes in a row. Of 16 bits it is 8 elements at a time; four lanes read 64 bytes.
#include "cuda/gemm.h"
#include "cuda/mma.h"
#include "cuda/nibble_table.h"

namespace qlora::cuda {

namespace {

constexpr int kFeatures = 16, kWarps = 8;
constexpr int kTokens = static_cast<int>(kFewRows);
constexpr int kShare = 64;  // weights of 4 bits of a lane and row
constexpr int kNested = 256;

/// What a lane has read of a row's chunk, not yet decoded.
struct FourBitShare {
  uint4 codes[2];
  float absmax[2];  // with double quantization: of the nested block
  uint8_t index[2];
};

/// Two steps of 16 k: 8 elements of two rows with 8 of a token.
template <class T>
QLORA_DEVICE void addEight(float (&sum)[4], const uint32_t (&first)[4], const uint32_t (&second)[4], uint4 x) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t a[4] = {first[2 * h], second[2 * h], first[2 * h + 1], second[2 * h + 1]};
    const uint32_t b[2] = {h ? x.z : x.x, h ? x.w : x.y};
    mma<T>(sum, a, b);
  }
}

template <class T>
struct FourBitRows {
  using Share = FourBitShare;
  static constexpr int kChunk = 4 * kShare;

  const Elements& b;
  const float *code, *nestedCode;  // shared

  QLORA_DEVICE Share read(int64_t n, int64_t k, bool valid) const {
    Share s{};
    if (!valid) return s;
    const int64_t at = n * b.stride + k;
    const auto* packed = static_cast<const uint8_t*>(b.data) + at / 2;
    s.codes[0] = loadOnce(packed);
    s.codes[1] = loadOnce(packed + 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h == 1 && b.blockShift > 5) break;  // the same block
      const int64_t block = (at + 32 * h) >> b.blockShift;
      if (b.scales.absmax) {
        s.absmax[h] = b.scales.absmax[block];
      } else {
        s.absmax[h] = b.scales.nestedAbsmax[block >> kNestedShift];
        s.index[h] = b.scales.index[block];
      }
    }
    return s;
  }

  QLORA_DEVICE float absmaxOf(const Share& s, int h) const {
    return b.scales.absmax ? s.absmax[h] : nestedCode[s.index[h]] * s.absmax[h] + b.scales.offset;
  }

  /// token(i): elements k + 8 i to k + 8 i + 7 of x.
  template <class Token>
  QLORA_DEVICE void add(float (&sum)[4], const Share& first, const Share& second, Token&& token) const {
    NibbleTable<T> of1(code, absmaxOf(first, 0)), of2(code, absmaxOf(second, 0));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h == 1 && b.blockShift == 5) {
        of1 = NibbleTable<T>(code, absmaxOf(first, 1));
        of2 = NibbleTable<T>(code, absmaxOf(second, 1));
      }
      const uint32_t codes1[4] = {first.codes[h].x, first.codes[h].y, first.codes[h].z, first.codes[h].w};
      const uint32_t codes2[4] = {second.codes[h].x, second.codes[h].y, second.codes[h].z, second.codes[h].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t weights1[4], weights2[4];
        of1.decode(codes1[i], weights1);
        of2.decode(codes2[i], weights2);
        addEight<T>(sum, weights1, weights2, token(4 * h + i));
      }
    }
  }
};

struct DenseShare {
  uint4 weights[4];
};

template <class T>
struct DenseRows {
  using Share = DenseShare;
  static constexpr int kPieces = 4, kChunk = 4 * 8 * kPieces;
  const Elements& b;
  int64_t K;

  QLORA_DEVICE Share read(int64_t n, int64_t k, bool valid) const {
    Share s{};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (valid && k + 32 * i < K) {
        s.weights[i] = loadOnce(static_cast<const T*>(b.data) + n * b.stride + k + 32 * i);
      }
    }
    return s;
  }
  template <class Token>
  QLORA_DEVICE void add(float (&sum)[4], const Share& first, const Share& second, Token&& token) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 f = first.weights[i], s = second.weights[i];
      addEight<T>(sum, {f.x, f.y, f.z, f.w}, {s.x, s.y, s.z, s.w}, token(i));
    }
  }
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

template <class T, bool fourBit>
__global__ void __launch_bounds__(kWarps* kWarpSize) fewKernel(Gemm g) {
  QLORA_SHARED_ARRAY(float, sums, kWarps* kFeatures* kTokens);
  QLORA_SHARED_ARRAY(float, code, 16);
  QLORA_SHARED_ARRAY(float, nestedCode, kNested);
  const int lane = laneIndex(), own = lane / 4, share = lane % 4;
  const int64_t firstN = int64_t{blockIdx.x} * kFeatures, n1 = firstN + own, n2 = n1 + 8;
  if constexpr (fourBit) {
    if (threadIdx.x < 16) code[threadIdx.x] = g.b.code[threadIdx.x];
    if (!g.b.scales.absmax) nestedCode[threadIdx.x] = g.b.scales.nestedCode[threadIdx.x];
    syncBlock();
  }
  const auto rows = [&] {
    if constexpr (fourBit) {
      return FourBitRows<T>{g.b, code, nestedCode};
    } else {
      return DenseRows<T>{g.b, g.K};
    }
  }();
  using Rows = std::remove_const_t<decltype(rows)>;
  constexpr int kChunk = Rows::kChunk, kStart = fourBit ? kShare : 8, kNext = fourBit ? 8 : 32;
  const int64_t stride = int64_t{kWarps} * kChunk;
  const T* x = static_cast<const T*>(g.a.data) + own * g.a.stride;
  // Warps whose chunks are at an end go on with zeros: all meet at each mma.
  int64_t k = int64_t{warpIndex()} * kChunk + share * kStart;
  auto next1 = rows.read(n1, k, k < g.K && n1 < g.N), next2 = rows.read(n2, k, k < g.K && n2 < g.N);
  float sum[4] = {};
  for (int64_t chunk = 0; chunk * kChunk < g.K; chunk += kWarps) {
    const auto now1 = next1, now2 = next2;
    const int64_t at = k;
    k += stride;
    next1 = rows.read(n1, k, k < g.K && n1 < g.N);
    next2 = rows.read(n2, k, k < g.K && n2 < g.N);
    rows.add(sum, now1, now2, [&](int i) {
      const int64_t from = at + kNext * i;
      return own < g.M && from < g.K ? *reinterpret_cast<const uint4*>(x + from) : make_uint4(0, 0, 0, 0);
    });
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    sums[(warpIndex() * kFeatures + own + e / 2 * 8) * kTokens + 2 * share + e % 2] = sum[e];
  }
  syncBlock();
  const int feature = static_cast<int>(threadIdx.x) % kFeatures, token = static_cast<int>(threadIdx.x) / kFeatures;
  if (token >= g.M || firstN + feature >= g.N) return;
  float all = extraOf<T>(g.extra, token, firstN + feature);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all += sums[(w * kFeatures + feature) * kTokens + token];
  g.out.store(token, firstN + feature, all);
}

}  // namespace

void gemmFew(Context& context, const Gemm& g) {
  const bool fourBit = g.b.dtype == DType::u8;
  const auto kernel = g.compute == DType::bf16 ? (fourBit ? fewKernel<bf16, true> : fewKernel<bf16, false>)
                                               : (fourBit ? fewKernel<f16, true> : fewKernel<f16, false>);
  launch(context, kernel, (g.N + kFeatures - 1) / kFeatures, kWarps * kWarpSize, 0, g);
}

}  // namespace qlora::cuda
