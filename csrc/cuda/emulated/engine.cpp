#include "cuda/emulated/engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/emulated/fiber.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace qlora::emulated {

constinit thread_local const Place* place = nullptr;

namespace {

enum class State : uint8_t { ready, polling, atBarrier, atWarp, finished };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Thread {
  Fiber fiber;
  Place place;
  State state;
  int warp, lane;
  int64_t exchanges;        // warp operations that it has come to
  std::vector<Copy> begun;  // copies since the last commit
  std::vector<std::vector<Copy>> committed;
};

/// What lanes give each other. Two buffers, since a lane may be one operation ahead of another that still reads.
struct Warp {
  alignas(64) unsigned char payload[2][kWarp * kPayload];
  const char* what;
  size_t bytes;
  int arrived;
};

/// A copy that arrives when its barrier is waited for.
struct BulkCopy {
  const void* barrier;
  std::function<void()> copy;
};

struct SharedArray {
  const void* declaration;
  size_t offset;
};

struct alignas(128) SharedLine {
  uint32_t words[32];
};

constexpr uint32_t kPoison = 0x7fbadbad;  // NaN as fp32, and both halves NaN or huge

/// The block that runs on this thread of the process, with stacks that are kept.
class Engine {
 public:
  ~Engine() {
    if (stacks_) munmap(stacks_, kMaxThreads * kFiberStack);
  }

  void run(const std::string& kernel, dim3 grid, dim3 block, size_t sharedBytes, size_t maxShared,
           const std::function<void()>& body) {
    threads_.resize(std::max<size_t>(threads_.size(), kMaxThreads));
    warps_.resize(kMaxThreads / kWarp);
    shared_.resize(kMaxShared / sizeof(SharedLine));
    if (!stacks_) {
      void* stacks = mmap(nullptr, kMaxThreads * kFiberStack, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stacks == MAP_FAILED) throw std::bad_alloc();
      stacks_ = static_cast<char*>(stacks);
    }
    kernel_ = kernel;
    body_ = &body;
    count_ = static_cast<int>(block.x * block.y * block.z);
    dynamicBytes_ = sharedBytes;
    maxShared_ = maxShared;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) runBlock({x, y, z}, grid, block);
      }
    }
  }

  Thread& current() { return *current_; }

  void barrier() {
    if (++atBarrier_ == count_) {
      atBarrier_ = 0;
      for (int i = 0; i < count_; ++i) threads_[i].state = State::ready;
      return;
    }
    current_->state = State::atBarrier;
    giveWay();
  }

  const unsigned char* exchange(const char* what, const void* payload, size_t bytes) {
    Thread& thread = *current_;
    Warp& warp = warps_[thread.warp];
    unsigned char* buffer = warp.payload[thread.exchanges++ & 1];
    if (warp.arrived > 0 && ((warp.what != what && std::strcmp(warp.what, what)) || warp.bytes != bytes)) {
      complain("lanes of a warp meet at different operations: %s and %s", warp.what, what);
    }
    warp.what = what;
    warp.bytes = bytes;
    std::memcpy(buffer + thread.lane * kPayload, payload, bytes);
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      for (int l = 0; l < kWarp; ++l) threads_[thread.warp * kWarp + l].state = State::ready;
    } else {
      thread.state = State::atWarp;
      giveWay();
    }
    return buffer;
  }

  void waitUntil(const void* barrier, const std::function<bool()>& holds) {
    for (;;) {
      for (size_t i = 0; i < bulkCopies_.size();) {
        if (bulkCopies_[i].barrier != barrier) {
          ++i;
          continue;
        }
        const auto copy = std::move(bulkCopies_[i].copy);
        bulkCopies_.erase(bulkCopies_.begin() + static_cast<std::ptrdiff_t>(i));
        copy();
      }
      if (holds()) break;
      current_->state = State::polling;
      giveWay();
    }
    current_->state = State::ready;
    waited_ = true;
  }
  void whenWaited(const void* barrier, std::function<void()> copy) {
    bulkCopies_.push_back({barrier, std::move(copy)});
  }

  void* sharedArray(const void* declaration, size_t bytes) {
    for (const SharedArray& array : arrays_) {
      if (array.declaration == declaration) return bytesAt(array.offset);
    }
    const size_t offset = (staticBytes_ + 127) / 128 * 128;
    staticBytes_ = offset + bytes;
    if (staticBytes_ > kStaticShared) complain("%zu bytes of shared arrays, at most 48 KiB", staticBytes_);
    if (staticBytes_ + dynamicBytes_ > maxShared_) {
      complain("%zu bytes of shared memory, at most %zu", staticBytes_ + dynamicBytes_, maxShared_);
    }
    arrays_.push_back({declaration, offset});
    return poisoned(offset, bytes);
  }
  // Behind the arrays, wherever these end.
  void* dynamicShared() { return bytesAt(dynamicOffset()); }

  const std::string& kernel() const { return kernel_; }

 private:
  size_t dynamicOffset() const { return kMaxShared - (dynamicBytes_ + 127) / 128 * 128; }
  void* poisoned(size_t offset, size_t bytes) {
    std::fill_n(reinterpret_cast<uint32_t*>(bytesAt(offset)), (bytes + 3) / 4, kPoison);
    return bytesAt(offset);
  }
  char* bytesAt(size_t offset) { return reinterpret_cast<char*>(shared_.data()) + offset; }
  void giveWay() { switchTo(current_->fiber, scheduler_); }

  static void enter();

  void runBlock(uint3 index, dim3 grid, dim3 block) {
    atBarrier_ = 0;
    staticBytes_ = 0;
    arrays_.clear();
    bulkCopies_.clear();
    poisoned(dynamicOffset(), dynamicBytes_);
    for (int i = 0; i < count_; ++i) {
      Thread& t = threads_[i];
      const unsigned n = static_cast<unsigned>(i);
      t.place = {{n % block.x, n / block.x % block.y, n / (block.x * block.y)}, index, block, grid};
      t.state = State::ready;
      t.warp = i / kWarp;
      t.lane = i % kWarp;
      t.exchanges = 0;
      t.begun.clear();
      t.committed.clear();
      // Not all at the same place of a page, or they would share a few sets of the caches.
      const size_t skew = n * 832 % (kFiberStack / 2);
      prepare(t.fiber, stacks_ + (i + 1) * kFiberStack - skew, enter);
    }
    for (Warp& warp : warps_) warp.arrived = 0;
    permute();
    for (int finished = 0; finished < count_;) {
      bool any = false;
      for (const int i : order_) {
        current_ = &threads_[i];
        const bool polled = current_->state == State::polling;
        if (current_->state != State::ready && !polled) continue;
        place = &current_->place;
        switchTo(scheduler_, current_->fiber);
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        any |= !polled || std::exchange(waited_, false);
        finished += current_->state == State::finished;
      }
      if (!any) reportDeadlock(finished);
    }
  }

  /// Warps in another order in each block, and lanes in another order in each warp.
  void permute() {
    static const uint64_t seed =
        std::getenv("QLORA_CUDA_SEED") ? std::strtoull(std::getenv("QLORA_CUDA_SEED"), nullptr, 10) : 1;
    order_.resize(static_cast<size_t>(count_));
    std::iota(order_.begin(), order_.end(), 0);
    if (seed == 0) return;
    uint64_t state = seed * 0x9E3779B97F4A7C15 + ++blocks_;
    for (size_t i = order_.size() - 1; i > 0; --i) {
      state = state * 6364136223846793005 + 1442695040888963407;
      std::swap(order_[i], order_[(state >> 33) % (i + 1)]);
    }
  }

  [[noreturn]] void reportDeadlock(int finished) {
    int atWarp = 0, polling = 0;
    for (int i = 0; i < count_; ++i) {
      atWarp += threads_[i].state == State::atWarp;
      polling += threads_[i].state == State::polling;
    }
    throw Error("ERR_QLORA_DEVICE", kernel_ + ": the block hangs: of " + std::to_string(count_) + " threads " +
                                        std::to_string(atBarrier_) + " wait at __syncthreads, " +
                                        std::to_string(atWarp) + " at a warp operation, " + std::to_string(polling) +
                                        " for a copy, " + std::to_string(finished) + " have ended");
  }

  std::string kernel_;
  const std::function<void()>* body_ = nullptr;
  int count_ = 0, atBarrier_ = 0;
  bool waited_ = false;  // successfully, since the scheduler looked
  size_t staticBytes_ = 0, dynamicBytes_ = 0, maxShared_ = 0;
  uint64_t blocks_ = 0;
  char* stacks_ = nullptr;
  Fiber scheduler_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<SharedArray> arrays_;
  std::vector<BulkCopy> bulkCopies_;
  std::vector<SharedLine> shared_;
  std::vector<int> order_;
};

constinit thread_local Engine* engine = nullptr;

void Engine::enter() {
  Engine& own = *engine;
  try {
    (*own.body_)();
    own.current_->state = State::finished;
  } catch (...) {
    own.error_ = std::current_exception();
  }
  own.giveWay();
}

}  // namespace

void syncThreads() { engine->barrier(); }
int laneOfThread() { return engine->current().lane; }
void* sharedArray(const void* declaration, size_t bytes) { return engine->sharedArray(declaration, bytes); }
void* dynamicShared() { return engine->dynamicShared(); }
const unsigned char* exchange(const char* what, const void* payload, size_t bytes) {
  return engine->exchange(what, payload, bytes);
}

void complain(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error("ERR_QLORA_DEVICE", engine->kernel() + ": " + message);
}

void waitUntil(const void* barrier, const std::function<bool()>& holds) { engine->waitUntil(barrier, holds); }
void whenWaited(const void* barrier, std::function<void()> copy) { engine->whenWaited(barrier, std::move(copy)); }

void beginCopy(void* to, const void* from, size_t bytes, size_t zeros) {
  engine->current().begun.push_back({to, from, bytes, zeros});
}
void commitCopies() {
  Thread& thread = engine->current();
  thread.committed.push_back(std::exchange(thread.begun, {}));
}
void waitForCopies(int groupsLeft) {
  auto& groups = engine->current().committed;
  while (static_cast<int>(groups.size()) > groupsLeft) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
    }
    groups.erase(groups.begin());
  }
}

void run(const std::string& kernel, dim3 grid, dim3 block, size_t sharedBytes, size_t maxShared,
         const std::function<void()>& body) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp) {
    throw Error("ERR_QLORA_DEVICE", kernel + ": a block of " + std::to_string(threads) +
                                        " threads; it must be whole warps, at most 1024 threads");
  }
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) {
    throw Error("ERR_QLORA_DEVICE", kernel + ": the grid is too large");
  }
  if (sharedBytes > maxShared) {
    throw Error("ERR_QLORA_DEVICE", kernel + ": " + std::to_string(sharedBytes) + " bytes of shared memory, at most " +
                                        std::to_string(maxShared));
  }
  thread_local Engine own;
  engine = &own;
  own.run(kernel, grid, block, sharedBytes, maxShared, body);
}

}  // namespace qlora::emulated
