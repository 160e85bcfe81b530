// The engine without Node, for ThreadSanitizer and AddressSanitizer with LeakSanitizer: the thread pool, streams,
// memory, and a layer forward and backward on several streams at once, whose bits may not depend on any of it.
#include <atomic>
#include <stdexcept>
#include <thread>

#include "core/operation.h"
#include "ops/op_table.h"
#include "testing.h"

namespace qlora {

namespace {

void testPool() {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (const int64_t count : {0, 1, 2, 3, 64, 1000}) {
      std::vector<int> visits(static_cast<size_t>(count), 0);
      pool.parallelFor(count, [&](int64_t i, int thread) {
        CHECK(thread >= 0 && thread < threads);
        ++visits[static_cast<size_t>(i)];
      });
      for (const int n : visits) CHECK(n == 1);
    }
    // Several owners at once, and pauses long enough for the workers to fall asleep.
    std::vector<std::thread> owners;
    std::atomic<int64_t> sum{0};
    for (int owner = 0; owner < 3; ++owner) {
      owners.emplace_back([&] {
        for (int loop = 0; loop < 50; ++loop) {
          pool.parallelFor(17, [&](int64_t i, int) { sum += i; });
          if (loop % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
      });
    }
    for (std::thread& owner : owners) owner.join();
    CHECK(sum == 3 * 50 * 136);
    // The first exception comes out; the pool goes on.
    for (int i = 0; i < 20; ++i) {
      bool thrown = false;
      try {
        pool.parallelFor(100, [&](int64_t index, int) {
          if (index == i) throw std::runtime_error("planned");
        });
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      CHECK(thrown);
    }
  }
}

void testStream() {
  for (int round = 0; round < 20; ++round) {
    auto memory = std::make_shared<Memory>(Backing::pages);
    Stream stream(memory, cpuTable());
    std::atomic<int> ran{0};
    std::vector<std::thread> posters;
    for (int poster = 0; poster < 3; ++poster) {
      posters.emplace_back([&] {
        try {
          for (int i = 0; i < 100; ++i) {
            stream.post([&](Context& context) {
              context.scratch.take<float>(100)[99] = 1;
              ++ran;
            });
          }
        } catch (const Error& error) {
          CHECK(error.code == "ERR_QLORA_DISPOSED");
        }
      });
    }
    if (round % 2) stream.close();  // while they post
    for (std::thread& poster : posters) poster.join();
    if (round % 2 == 0) {
      while (ran < 300) std::this_thread::yield();
    }
    stream.close();
    CHECK(ran <= 300);
    CHECK(memory->counter().live() == 0);
  }
}

void testMemory() {
  Memory memory(Backing::pages);
  std::vector<std::thread> users;
  for (int user = 0; user < 3; ++user) {
    users.emplace_back([&memory, user] {
      std::vector<std::pair<void*, size_t>> held;
      for (size_t i = 0; i < 300; ++i) {
        const size_t bytes = 1 + (i * 7919 + static_cast<size_t>(user) * 104729) % 300000;
        void* p = memory.allocate(bytes, MemoryClass::activations);
        CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0);
        std::memset(p, user, bytes);
        held.emplace_back(p, bytes);
        if (i % 3 == 2) {
          memory.release(held[held.size() / 2].first, held[held.size() / 2].second, MemoryClass::activations);
          held.erase(held.begin() + static_cast<ptrdiff_t>(held.size() / 2));
        }
      }
      for (const auto& [p, bytes] : held) {
        CHECK(*static_cast<char*>(p) == user && static_cast<char*>(p)[bytes - 1] == user);
        memory.release(p, bytes, MemoryClass::activations);
      }
    });
  }
  for (std::thread& user : users) user.join();
  CHECK(memory.counter().live() == 0);
  memory.trim();
  memory.setLimit(1000);
  try {
    memory.allocate(1001, MemoryClass::weights);
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.code == "ERR_QLORA_OUT_OF_MEMORY");
  }
}

/// A 4-bit layer with LoRA, norm, attention and loss, forward and backward, of odd sizes; everything that it computed.
std::vector<std::vector<char>> runLayer(Stream& stream, const OpTable& ops, DType dtype) {
  const std::shared_ptr<Memory>& memory = stream.sharedMemory();
  constexpr int64_t T = 37, H = 2, D = 24, K = H * D, N = K, V = 101, r = 5;
  const auto make = [&](DType type, std::initializer_list<int64_t> shape) { return makeTensor(memory, type, shape); };
  uint64_t draws = 0;
  const auto uniform = [&](std::initializer_list<int64_t> shape) {
    Tensor t = make(DType::f32, shape);
    enqueue(stream, RandomUniform{t, -1, 1, 7, draws++}, ops.randomUniform, "randomUniform");
    return t;
  };
  const auto narrow = [&](const Tensor& x, std::initializer_list<int64_t> shape) {
    Tensor y = make(dtype, shape);
    enqueue(stream, Cast{x, y}, ops.cast, "cast");
    return y;
  };
  const auto zeros = [&](std::initializer_list<int64_t> shape) {
    Tensor t = make(DType::f32, shape);
    enqueue(stream, Fill{t, 0}, ops.fill, "fill");
    return t;
  };

  Weight weight{
      make(DType::u8, {N * K / 2}), make(DType::f32, {N * K / 64}), make(DType::f32, {16}), {}, {}, N, K, 64, 0};
  enqueue(stream, Quantize4bit{uniform({N, K}), weight.data, weight.absmax, 0, 64}, ops.quantize4bit, "quantize4bit");
  enqueue(stream, FourBitCode{weight.code, 0}, ops.fourBitCode, "fourBitCode");
  const Tensor loraA = uniform({r, K}), loraB = uniform({N, r}), gain = uniform({K});
  const Tensor x = narrow(uniform({T, K}), {T, K});

  const Tensor normed = make(dtype, {T, K}), rstd = make(DType::f32, {T});
  enqueue(stream, RmsNormForward{x, gain, normed, rstd, 1e-5f, 0}, ops.rmsNormForward, "rmsNormForward");
  const Tensor y = make(dtype, {T, N}), t = make(dtype, {T, r});
  enqueue(stream, LoraLinearForward{normed, weight, {}, loraA, loraB, y, t, 0.5f, 0.1f, 3, 4}, ops.loraLinearForward,
          "loraLinearForward");
  const auto heads = [&](const Tensor& flat) {
    Tensor view = flat;
    view.rank = 4;
    view.shape = {1, T, H, D};
    return view;
  };
  const Tensor out = make(dtype, {1, T, H, D}), logSumExp = make(DType::f32, {1, H, T});
  enqueue(stream, AttentionForward{heads(y), heads(y), heads(y), {}, {}, {}, out, logSumExp, 0.2f, 1, 0, 0},
          ops.attentionForward, "attentionForward");
  Tensor hidden = out;
  hidden.rank = 2;
  hidden.shape = {T, K};
  Weight head{uniform({V, K}), {}, {}, {}, {}, V, K, 0, 0};
  const Tensor labels = make(DType::i32, {T});
  stream.post([labels](Context&) {
    labels.storage->allocate();
    for (int64_t i = 0; i < T; ++i) labels.data<int32_t>()[i] = i % 3 ? static_cast<int32_t>(i) : kIgnoredLabel;
  });
  const Tensor loss = make(DType::f32, {1}), dhidden = make(dtype, {T, K}), dhead = zeros({V, K});
  enqueue(stream, LinearCrossEntropy{hidden, head, {}, labels, {}, loss, {}, dhidden, dhead, 0.04f, 0},
          ops.linearCrossEntropy, "linearCrossEntropy");
  const Tensor dq = make(dtype, {1, T, H, D}), dk = make(dtype, {1, T, H, D}), dv = make(dtype, {1, T, H, D});
  enqueue(stream,
          AttentionBackward{
              heads(dhidden), heads(y), heads(y), heads(y), out, logSumExp, {}, {}, dq, dk, dv, 0.2f, 1, 0, 0},
          ops.attentionBackward, "attentionBackward");
  Tensor dy = dv;
  dy.rank = 2;
  dy.shape = {T, N};
  const Tensor dnormed = make(dtype, {T, K}), dA = zeros({r, K}), dB = zeros({N, r});
  enqueue(stream, LoraLinearBackward{dy, normed, weight, loraA, loraB, t, dnormed, dA, dB, 0.5f, 0.1f, 3, 4},
          ops.loraLinearBackward, "loraLinearBackward");
  const Tensor dx = make(dtype, {T, K}), dgain = zeros({K});
  enqueue(stream, RmsNormBackward{dnormed, x, gain, rstd, dx, dgain, 0}, ops.rmsNormBackward, "rmsNormBackward");
  const Tensor norm = make(DType::f32, {2});
  enqueue(stream, GradNorm{{dA, dB, dgain, dhead}, norm}, ops.gradNorm, "gradNorm");

  std::vector<std::vector<char>> results;
  std::atomic<bool> done{false};
  stream.post([&](Context&) {
    for (const Tensor& result : {weight.data, y, out, loss, dx, dq, dk, dA, dB, dgain, dhead, norm}) {
      CHECK(!result.storage->error);
      results.push_back(bytesOf(result));
    }
    done = true;
  });
  while (!done) std::this_thread::yield();
  return results;
}

/// Three streams over one pool compute the same bits as one.
void testLayers() {
  const CpuTables here = cpuTables();
  for (int i = 0; i < here.count; ++i) {
    const OpTable& ops = *here.tables[i];
    for (const DType dtype : {DType::f32, DType::bf16}) {
      std::vector<std::vector<char>> expected;
      {
        Stream stream(std::make_shared<Memory>(Backing::pages), ops);
        expected = runLayer(stream, ops, dtype);
      }
      std::vector<std::thread> users;
      for (int user = 0; user < 3; ++user) {
        users.emplace_back([&] {
          Stream stream(std::make_shared<Memory>(Backing::pages), ops);
          for (int round = 0; round < 3; ++round) CHECK(runLayer(stream, ops, dtype) == expected);
        });
      }
      for (std::thread& user : users) user.join();
    }
    std::printf("%s\n", ops.name);
  }
}

}  // namespace

}  // namespace qlora

int main() {
  qlora::testPool();
  qlora::testStream();
  qlora::testMemory();
  qlora::testLayers();
  CHECK(qlora::processMemory().live() == 0);
  std::printf("ok\n");
}
