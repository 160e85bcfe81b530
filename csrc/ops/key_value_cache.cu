// Places that JavaScript wrote are checked before the launch, as on the CPU; those of another origin by the kernel,
// which leaves a row where it finds one that does not fit.
#include "cuda/rows.h"
#include "ops/key_value_cache.h"

namespace qlora::cuda {

namespace {

/// Tokens that gathering within one cache holds at a time.
constexpr int64_t kGatherTokens = 256;

int64_t bytesOfToken(const Tensor& cache) {
  return cache.dim(2) * cache.dim(3) * static_cast<int64_t>(sizeOf(cache.dtype));
}

/// Calls f with the widest type that tokens of so many bytes are made of.
template <class F>
void dispatchWord(int64_t bytes, F&& f) {
  if (bytes % 16 == 0) return f(uint4{});
  f(uint16_t{});
}

/// Row from[b] of `source` to row b of `target`, or row b of both where `picks` is false.
template <class Word>
struct Gather {
  const Word* source;
  Word* target;
  const int32_t* from;
  int64_t sourceRows, sourceStride, targetStride;
  bool picks;

  QLORA_DEVICE bool operator()(int64_t b, const Word*& begin, Word*& to) const {
    if (from[b] < 0 || from[b] >= sourceRows) return false;
    begin = source + (picks ? from[b] : b) * sourceStride;
    to = target + b * targetStride;
    return true;
  }
};

/// to[b, toToken(b) + t] = from[fromRow(b), t + fromToken] for blockIdx.y = b and t < tokens.
template <class Word>
__global__ void moveKernel(int64_t tokens, int64_t words, Gather<Word> move) {
  beginEarly();
  const Word* from;
  Word* to;
  if (!move(static_cast<int64_t>(blockIdx.y), from, to)) return;
  for (int64_t i = threadIndex(); i < tokens * words; i += threadCount()) to[i] = from[i];
}

template <class Word>
void move(Context& context, int64_t B, int64_t tokens, int64_t words, const Gather<Word>& how) {
  const dim3 grid(static_cast<unsigned>(blocksFor(tokens * words)), static_cast<unsigned>(B));
  launchEarly(context, moveKernel<Word>, grid, kThreads, 0, tokens, words, how);
}

}  // namespace

void gatherKeyValue(Context& context, const GatherKeyValue& a) {
  const int64_t B = a.cache.dim(0), sources = a.source.dim(0), bytes = bytesOfToken(a.cache);
  if (a.from.storage->hostCopy) {
    const std::vector<int32_t> from = hostValues(context, a.from);
    for (size_t b = 0; b < from.size(); ++b) {
      if (from[b] >= -1 && from[b] < sources) continue;
      fail("ERR_QLORA_ARGUMENT", "gatherKeyValue: from[%zu] must be from -1 to %lld, got %d", b,
           static_cast<long long>(sources - 1), from[b]);
    }
  }
  dispatchWord(bytes, [&](auto word) {
    using Word = decltype(word);
    const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t sourceStride = a.source.dim(1) * words, cacheStride = a.cache.dim(1) * words;
    const int64_t heldStride = kGatherTokens * words;
    const int32_t* from = a.from.data<int32_t>();
    // All rows are read before the first is written: source may be the cache.
    Word* held = context.scratch.take<Word>(B * heldStride);
    for (int64_t t = a.begin; t < a.end; t += kGatherTokens) {
      const int64_t tokens = std::min(kGatherTokens, a.end - t);
      move(context, B, tokens, words,
           Gather<Word>{a.source.data<Word>() + t * words, held, from, sources, sourceStride, heldStride, true});
      move(context, B, tokens, words,
           Gather<Word>{held, a.cache.data<Word>() + t * words, from, sources, heldStride, cacheStride, false});
    }
  });
}

}  // namespace qlora::cuda
