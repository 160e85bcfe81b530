// What the emulation of a GPU reports: the mistakes of kernels that a GPU would hang at, or answer with garbage.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/tma.h"
#include "testing.h"

using namespace qlora;

namespace {

/// The message of what run() throws, or "".
template <class Body>
std::string complaint(unsigned threads, size_t shared, Body&& body) {
  try {
    emulated::run("kernel", 2, threads, shared, emulated::maxSharedOf(75), body);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void sums() {
  std::vector<float> sums(96);
  CHECK(complaint(96, 0, [&] { sums[threadIdx.x] = blockSum(static_cast<float>(threadIdx.x)); }) == "");
  for (const float sum : sums) CHECK(sum == 95 * 48);
  std::vector<float> largest(64);
  CHECK(complaint(64, 0, [&] { largest[threadIdx.x] = blockMax(-1.0f - static_cast<float>(threadIdx.x)); }) == "");
  for (const float value : largest) CHECK(value == -1);
  unsigned bits = 0;
  CHECK(complaint(32, 0, [&] { bits = ballot(laneIndex() % 3 == 0); }) == "");
  CHECK(bits == 0x49249249u);
}

void mistakes() {
  CHECK(has(complaint(64, 0,
                      [] {
                        if (threadIdx.x != 5) syncBlock();
                      }),
            "the block hangs: of 64 threads 63 wait"));
  CHECK(has(complaint(32, 0,
                      [] {
                        if (laneIndex() > 0) syncWarp();
                      }),
            "31 at a warp operation"));
  CHECK(has(complaint(32, 0, [] { laneIndex() ? (void)shuffle(1, 0) : syncWarp(); }), "different operations"));
  CHECK(has(complaint(40, 0, [] {}), "whole warps"));
  CHECK(has(complaint(2048, 0, [] {}), "at most 1024"));
  CHECK(has(complaint(32, 65 << 10, [] {}), "kernel: 66560 bytes of shared memory, at most 65536"));
  CHECK(has(complaint(32, 0,
                      [] {
                        QLORA_SHARED_ARRAY(float, large, 20000);
                        large[0] = 0;
                      }),
            "at most 48 KiB"));
  CHECK(has(complaint(32, 40 << 10,
                      [] {
                        QLORA_SHARED_ARRAY(float, beside, 7000);
                        beside[0] = 0;
                      }),
            "68960 bytes of shared memory, at most 65536"));
  alignas(16) float values[8] = {};
  CHECK(has(complaint(32, 0, [&] { (void)loadPack<4>(values + 1); }), "not aligned"));
}

/// Without a barrier between, some thread reads what another has not written yet, and finds NaN.
void missingBarrier() {
  for (const bool withBarrier : {true, false}) {
    int poisoned = 0;
    CHECK(complaint(128, 512, [&] {
            float* shared = dynamicShared<float>();
            shared[threadIdx.x] = 1;
            if (withBarrier) syncBlock();
            poisoned += std::isnan(shared[127 - threadIdx.x]);
          }) == "");
    CHECK((poisoned > 0) == !withBarrier);
  }
}

/// A copy that nobody waited for has not arrived.
void copies() {
  alignas(16) float from[4] = {1, 2, 3, 4};
  bool early = false, late = false;
  CHECK(complaint(32, 64, [&] {
          float* shared = dynamicShared<float>();
          if (threadIdx.x == 0) copyAsync16(shared, from);
          if (threadIdx.x == 0) copyAsync16(shared + 4, from, false);
          commitCopies();
          early |= threadIdx.x == 0 && shared[3] == 4;
          waitForCopies<0>();
          late |= threadIdx.x == 0 && shared[3] == 4 && shared[7] == 0;
        }) == "");
  CHECK(!early && late);
}

/// A box is there once its barrier was waited for, with zeros beyond the matrix; who waits for nothing hangs.
void boxes() {
  alignas(16) bf16 matrix[3][72];
  for (int i = 0; i < 3 * 72; ++i) matrix[i / 72][i % 72] = fromFloat<bf16>(static_cast<float>(i));
  const cuda::TensorMap map = cuda::tensorMapOf(matrix, DType::bf16, 3, 70, 72, 8);
  bool poisoned = false, right = true;
  const auto kernel = [&](int threads) {
    return [&, threads] {
      auto* bytes = dynamicShared<unsigned char>();
      bytes += (1024 - sharedAddress(bytes) % 1024) % 1024;
      auto* tile = reinterpret_cast<bf16*>(bytes);
      auto& arrived = *reinterpret_cast<cuda::Barrier*>(bytes + 1024);
      if (threadIdx.x == 0) {
        arrived.init(threads);
        cuda::showBarriers();
      }
      syncBlock();
      if (threadIdx.x == 0) {
        arrived.arriveExpecting(1024);
        cuda::copyBox(tile, map, 1, 8, arrived);
        poisoned = std::isnan(toFloat(tile[1]));
      }
      arrived.wait(0);
      if (threadIdx.x != 1) return;
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 64; ++c) {
          const float want = r < 2 && c < 62 ? toFloat(matrix[r + 1][c + 8]) : 0.0f;
          right &= toFloat(tile[r * 64 + ((c / 8) ^ r) * 8 + c % 8]) == want;
        }
      }
    };
  };
  CHECK(complaint(32, 3 << 10, kernel(1)) == "");
  CHECK(poisoned && right);
  CHECK(has(complaint(32, 3 << 10, kernel(2)), "32 for a copy"));
}

template <class T>
void products() {
  alignas(16) T a[256], b[128];
  float c[128];
  for (int i = 0; i < 256; ++i) a[i] = fromFloat<T>(static_cast<float>(i * 7 % 13 - 6));
  for (int i = 0; i < 128; ++i) b[i] = fromFloat<T>(static_cast<float>(i * 5 % 11 - 5));
  CHECK(complaint(32, 0, [&] {
          const int lane = laneIndex(), g = lane / 4, t = 2 * (lane % 4);
          uint32_t fragment[4], of_b[4];
          loadMatrices<false>(fragment, a + lane % 16 * 16 + lane / 16 * 8);
          loadMatrices<true>(of_b, b + lane % 16 * 8);
          const uint32_t pair[2] = {of_b[0], of_b[1]};
          float sum[4] = {};
          mma<T>(sum, fragment, pair);
          for (int k = 0; k < 4; ++k) c[(g + k / 2 * 8) * 8 + t + k % 2] = sum[k];
        }) == "");
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += toFloat(a[i * 16 + k]) * toFloat(b[k * 8 + j]);
      CHECK(c[i * 8 + j] == sum);
    }
  }
}

}  // namespace

int main() {
  sums();
  mistakes();
  missingBarrier();
  copies();
  boxes();
  products<bf16>();
  products<f16>();
  return 0;
}
