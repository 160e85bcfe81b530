// What cannot be asked for from JavaScript: the table of processors with processors that are not here, and the code for
// the processor's tiles, on a processor without them too (tile_trap.h). Matrix products must have the same bits on the
// processor's tiles and on the emulated ones.
#include <cmath>
#include <string>

#include "core/processor.h"
#include "core/wanted_isa.h"
#include "ops/attention.h"
#include "ops/cpu_choice.h"
#include "simd/gemm.h"
#include "simd/tile_product.h"
#include "testing.h"
#include "tile_trap.h"

namespace qlora {

namespace amx {
void attentionForward(Context&, const AttentionForward&);
void attentionBackward(Context&, const AttentionBackward&);
}  // namespace amx

static bool emulated = false;
bool tilesAreEmulated() { return emulated; }

namespace {

using namespace amx;

/// The set that the table names for a processor that runs `isas`; "" for none.
std::string chosen(const char* vendor, int family, int model, std::initializer_list<const char*> isas) {
  Processor p;
  std::snprintf(p.vendor, sizeof p.vendor, "%s", vendor);
  p.family = family;
  p.model = model;
  const CpuRule* rule = cpuRule(p, [&](const std::string& isa) {
    for (const char* name : isas) {
      if (isa == name) return true;
    }
    return false;
  });
  return rule ? rule->isa : "";
}

void testChoice() {
  CHECK(chosen("GenuineIntel", 6, 143, {"avx2", "avx512", "avx512bf16", "amx"}) == "amx");
  CHECK(chosen("GenuineIntel", 6, 207, {"avx2", "avx512", "avx512bf16", "amx"}) == "amx");
  CHECK(chosen("GenuineIntel", 6, 143, {"avx2", "avx512", "avx512bf16"}) == "avx512");
  CHECK(chosen("GenuineIntel", 6, 143, {"avx2"}) == "");
  CHECK(chosen("GenuineIntel", 6, 142, {"avx2", "avx512"}) == "");
  CHECK(chosen("GenuineIntel", 15, 143, {"avx2", "avx512"}) == "");
  CHECK(chosen("AuthenticAMD", 25, 17, {"avx2", "avx512", "avx512bf16"}) == "avx512bf16");
  CHECK(chosen("AuthenticAMD", 25, 1, {"avx2"}) == "");
  CHECK(chosen("AuthenticAMD", 6, 143, {"avx2", "avx512", "avx512bf16", "amx"}) == "");
  CHECK(chosen("", 0, 0, {"scalar"}) == "");
  for (const CpuRule& rule : kCpuRules) {
    CHECK(std::strlen(rule.vendor) == 12 && rule.firstModel <= rule.lastModel && std::strlen(rule.reason) > 0);
    CHECK(chosen(rule.vendor, rule.family, rule.firstModel, {rule.isa}) == rule.isa);
    CHECK(chosen(rule.vendor, rule.family, rule.lastModel, {rule.isa}) == rule.isa);
  }
}

class Numbers {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  /// With an exponent as bf16 has it in its bits, from `low` to `high`.
  bf16 between(uint32_t low, uint32_t high) {
    const uint32_t r = bits();
    return {
        static_cast<uint16_t>((r >> 16 & 0x8000) | (low + (r >> 8 & 0xff) % (high - low + 1)) << 7 | (r >> 24 & 127))};
  }
  /// Sums of them round and cancel.
  bf16 ordinary() { return between(120, 127); }

 private:
  uint64_t state_ = 1;
};

/// Same bits, or both not a number.
bool isSame(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }

/// Exponents of A and of B.
struct Range {
  uint32_t a[2], b[2];
};
constexpr Range kRanges[] = {
    {{120, 127}, {120, 127}},
    {{55, 70}, {55, 70}},  // products and sums about 2^-126
    {{0, 1}, {125, 140}},  // subnormals
    {{0, 255}, {0, 255}},  // infinities, and what is no number
};

/// Both kinds of tiles against each other, in whatever numbers, and what they may write.
void testProducts() {
  Numbers numbers;
  for (const Range& range : kRanges) {
    for (const int rows : {1, 16, 17, 32}) {
      for (const int lanes : {3, 16, 20, 32}) {
        for (const int64_t depth : {32, 256}) {
          const int64_t stride = depth + 32;
          std::vector<bf16> a(static_cast<size_t>(32 * stride)), b(static_cast<size_t>(depth * kTileLanes));
          for (bf16& x : a) x = numbers.between(range.a[0], range.a[1]);
          for (bf16& x : b) x = numbers.between(range.b[0], range.b[1]);
          std::vector<float> expected(kSumsSize), actual;
          for (float& sum : expected) sum = toFloat(numbers.ordinary());
          actual = expected;
          for (const bool first : {true, false, false}) {
            const auto before = expected;
            TileProduct tiles{a.data(), stride, b.data(), depth, expected.data()};
            multiplyTiles<EmulatedTiles>(rows, lanes, tiles, first);
            tiles.sums = actual.data();
            HardwareTiles::configure();
            multiplyTiles<HardwareTiles>(rows, lanes, tiles, first);
            HardwareTiles::release();
            for (int i = 0; i < kSumsSize; ++i) {
              CHECK(isSame(actual[i], expected[i]));
              const bool isOutside =
                  i / kTileLanes >= (rows > 16 ? 32 : 16) || i % kTileLanes >= (lanes > 16 ? 32 : 16);
              CHECK(!isOutside || isSame(actual[i], before[i]));
            }
          }
        }
      }
    }
  }
}

/// What kernels run in, with so many threads.
struct Engine {
  explicit Engine(int threads) : scratch(*memory), pool(threads) {
    // Scratch begins as numbers that are none: what a kernel forgets to fill shows.
    constexpr int64_t kBytes = 32 << 20;
    Scratch used = scratch.nested();
    std::memset(used.bytes(kBytes), 0xff, kBytes);
  }

  std::shared_ptr<Memory> memory = std::make_shared<Memory>(Backing::pages);
  Scratch scratch;
  ThreadPool pool;
  Context context{pool, scratch};
};

std::vector<char> product(GemmForm form, int64_t M, int64_t N, int64_t K, int threads) {
  Numbers numbers;
  std::vector<bf16> a(static_cast<size_t>(M * K)), b(static_cast<size_t>(N * K));
  for (auto* operand : {&a, &b}) {
    for (bf16& x : *operand) x = numbers.ordinary();
  }
  std::vector<char> c(static_cast<size_t>(M * N) * sizeof(float));
  Engine engine(threads);
  gemm(engine.context, {.form = form,
                        .compute = DType::bf16,
                        .M = M,
                        .N = N,
                        .K = K,
                        .a = {a.data(), DType::bf16, form == GemmForm::tn ? M : K},
                        .b = {b.data(), DType::bf16, form == GemmForm::nt ? K : N},
                        .c = c.data(),
                        .cDtype = DType::f32,
                        .cStride = N});
  for (int64_t i = 0; i < M * N; ++i) CHECK(std::isfinite(reinterpret_cast<const float*>(c.data())[i]));
  return c;
}

/// Attention of T queries and 70 keys, forward and, where there are as many of both, backward.
std::vector<char> attended(int64_t T, int threads) {
  constexpr int64_t H = 4, Hkv = 2, D = 40, S = 70;
  Engine engine(threads);
  Numbers numbers;
  std::vector<char> results;
  const auto make = [&](DType dtype, std::initializer_list<int64_t> shape) {
    const Tensor t = makeTensor(engine.memory, dtype, shape);
    t.storage->allocate();
    for (int64_t i = 0; dtype == DType::bf16 && i < t.size(); ++i) {
      t.data<bf16>()[i] = fromFloat<bf16>(static_cast<float>(numbers.bits() >> 24) / 64 - 2);
    }
    return t;
  };
  const auto keep = [&](const Tensor& t) {
    for (int64_t i = 0; i < t.size(); ++i) CHECK(std::isfinite(toFloat(t.data<bf16>()[i])));
    const std::vector<char> bytes = bytesOf(t);
    results.insert(results.end(), bytes.begin(), bytes.end());
  };
  const Tensor q = make(DType::bf16, {1, T, H, D}), k = make(DType::bf16, {1, S, Hkv, D});
  const Tensor v = make(DType::bf16, {1, S, Hkv, D}), out = make(DType::bf16, {1, T, H, D});
  const Tensor logSumExp = make(DType::f32, {1, H, T});
  attentionForward(engine.context, {q, k, v, {}, {}, {}, out, logSumExp, 0.2f, 1, 0, 0});
  keep(out);
  if (T != S) return results;
  const Tensor dout = make(DType::bf16, {1, T, H, D}), dq = make(DType::bf16, {1, T, H, D});
  const Tensor dk = make(DType::bf16, {1, S, Hkv, D}), dv = make(DType::bf16, {1, S, Hkv, D});
  attentionBackward(engine.context, {dout, q, k, v, out, logSumExp, {}, {}, dq, dk, dv, 0.2f, 1, 0, 0});
  for (const Tensor& gradient : {dq, dk, dv}) keep(gradient);
  return results;
}

/// run(threads) gives the same bits on emulated tiles and on the processor's, of which each thread has its own.
template <class Run>
void testKernel(Run&& run) {
  emulated = true;
  const std::vector<char> expected = run(1);
  emulated = false;
  for (const int threads : {1, 3}) CHECK(run(threads) == expected);
}

void testKernels() {
  for (const GemmForm form : {GemmForm::nt, GemmForm::nn, GemmForm::tn}) {
    for (const int64_t K : {45, 301}) testKernel([&](int threads) { return product(form, 37, 81, K, threads); });
  }
  for (const int64_t queries : {1, 33, 70}) testKernel([&](int threads) { return attended(queries, threads); });
}

}  // namespace

}  // namespace qlora

int main() {
  qlora::testChoice();
  if (!qlora::hasTiles()) tile_trap::install();
  qlora::testProducts();
  if (__builtin_cpu_supports("avx512bf16")) qlora::testKernels();
  CHECK(tile_trap::trapped > 0 || qlora::hasTiles());
  std::printf("%s\n", qlora::hasTiles() ? "tiles of the processor" : "tiles by traps");
}
