#include "core/parallel.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>

#include "core/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qlora {

namespace {

// Long enough to bridge the gaps between operations of a training step, short enough not to burn an idle core.
constexpr int kSpins = 20000;

// The parts of ThreadPool::loop_.
constexpr uint64_t kJoined = 0x7fff;
constexpr uint64_t kOpen = 0x8000;
constexpr uint64_t kStateBits = kJoined | kOpen;
constexpr uint64_t kNextLoop = 0x10000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // some tens of cycles, where `yield` takes none
#endif
}

constexpr int kMostThreads = 256;

int threadsFromEnvironment() {
  const char* text = std::getenv("QLORA_NUM_THREADS");
  if (!text || !*text) return std::clamp<int>(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostThreads);
  const char* end = text + std::strlen(text);
  int asked = 0;
  const auto [stop, error] = std::from_chars(text, end, asked);
  if (error != std::errc() || stop != end || asked < 1 || asked > kMostThreads) {
    throw Error("ERR_QLORA_CPU",
                "QLORA_NUM_THREADS must be a whole number from 1 to " + std::to_string(kMostThreads) + ", got '" +
                    text + "'",
                "Unset it to take one thread a core.");
  }
  return asked;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : shares_(static_cast<size_t>(threads)) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {
    // The system has no more threads: fewer compute the same bits.
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    loop_ += kNextLoop;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t count, Invoke invoke, void* body) {
  std::lock_guard owner(owner_);
  // The loop before is closed and left by all, so nobody reads these.
  const auto threads = static_cast<int64_t>(shares_.size());
  for (int64_t t = 0; t < threads; ++t) {
    shares_[t].next = t * count / threads;
    shares_[t].end = (t + 1) * count / threads;
  }
  invoke_ = invoke;
  body_ = body;
  failed_ = false;
  exception_ = nullptr;
  loop_ = ((loop_.load(std::memory_order_relaxed) & ~kStateBits) + kNextLoop) | kOpen;
  if (asleep_ > 0) {
    std::lock_guard lock(mutex_);  // a worker that is about to sleep has looked at loop_ under it
    wake_.notify_all();
  }
  drain(0);
  loop_.fetch_and(~kOpen);
  for (int spin = 0; loop_.load(std::memory_order_acquire) & kJoined; ++spin) {
    if (spin < kSpins) {
      pause();
    } else {
      std::unique_lock lock(mutex_);
      done_.wait(lock, [this] { return (loop_.load(std::memory_order_acquire) & kJoined) == 0; });
    }
  }
  if (exception_) std::rethrow_exception(exception_);
}

void ThreadPool::drain(int thread) {
  try {
    const size_t threads = shares_.size();
    for (size_t turn = 0; turn < threads; ++turn) {
      Share& share = shares_[(thread + turn) % threads];
      // One that is used up is only read: many threads writing to it would wait for each other.
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      for (int64_t i; !failed_ && (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        invoke_(body_, i, thread);
    }
  } catch (...) {
    std::lock_guard lock(mutex_);
    if (!failed_.exchange(true)) exception_ = std::current_exception();
  }
}

void ThreadPool::work(int thread) {
  yieldToEventLoop();
  uint64_t seen = 0;  // the number of the loop that was joined or missed last
  // Sequentially consistent with asleep_: either the owner sees this thread asleep, or this thread the new loop.
  const auto isNew = [&] { return (loop_.load() & ~kStateBits) != seen; };
  while (true) {
    for (int spin = 0; spin < kSpins && !isNew(); ++spin) pause();
    if (!isNew()) {
      std::unique_lock lock(mutex_);
      ++asleep_;
      wake_.wait(lock, isNew);
      --asleep_;
    }
    uint64_t state = loop_.load(std::memory_order_acquire);
    if (stop_) return;  // written before the loop's number was
    seen = state & ~kStateBits;
    while (state & kOpen && (state & ~kStateBits) == seen) {
      if (!loop_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      drain(thread);
      if (((loop_.fetch_sub(1, std::memory_order_acq_rel) - 1) & (kJoined | kOpen)) == 0) {
        std::lock_guard lock(mutex_);
        done_.notify_one();
      }
      break;
    }
  }
}

ThreadPool& threadPool() {
  // Never destroyed: at exit the operating system ends its threads, wherever they are.
  static ThreadPool& pool = *new ThreadPool(threadsFromEnvironment());
  return pool;
}

ThreadPool& idlePool() {
  static ThreadPool& pool = *new ThreadPool(ThreadPool::idle(threadPool()));
  return pool;
}

void yieldToEventLoop() {
#if defined(__linux__)
  const auto thread = static_cast<id_t>(syscall(SYS_gettid));
  setpriority(PRIO_PROCESS, thread, std::min(19, getpriority(PRIO_PROCESS, thread) + 5));
#endif
}

}  // namespace qlora
