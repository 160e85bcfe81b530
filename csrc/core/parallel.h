// The thread pool of the process. Streams share it, one operation at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/dtype.h"

namespace qlora {

/// Threads that stay. Each has its share of a loop's indices, consecutive ones, and takes from the others' when it is
/// done with its own; so it meets again, in its own caches, the rows that it wrote in the loop before. Results may not
/// depend on which thread takes which index; sums over indices are made in index order by the caller.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  /// One that says it is as large as `pool` and runs nothing: loops over it end at once.
  static ThreadPool idle(const ThreadPool& pool) { return ThreadPool(Idle{pool.size()}); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  /// The calling thread included.
  int size() const { return idleSize_ > 0 ? idleSize_ : static_cast<int>(workers_.size()) + 1; }

  /// Calls body(index, thread) for each index in [0, count) and returns when all are done; thread is in [0, size()).
  /// The first exception is rethrown here. Not reentrant.
  template <class Body>
  QLORA_INLINE void parallelFor(int64_t count, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    if (idleSize_ > 0) return;
    if (count == 1 || workers_.empty()) {
      for (int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    if (count > 0) {
      run(count, [](void* b, int64_t i, int thread) { (*static_cast<Plain*>(b))(i, thread); },
          const_cast<void*>(static_cast<const void*>(&body)));
    }
  }

 private:
  struct Idle {
    int size;
  };
  explicit ThreadPool(Idle idle) : idleSize_(idle.size) {}

  using Invoke = void (*)(void* body, int64_t index, int thread);

  void run(int64_t count, Invoke invoke, void* body);
  void work(int thread);
  void drain(int thread);

  const int idleSize_ = 0;
  std::vector<std::thread> workers_;
  std::mutex owner_;  // one loop at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  // The loop at hand: its number, whether workers may still join, and how many have. A worker that the system did not
  // run in time never joins, and nobody waits for it.
  std::atomic<uint64_t> loop_{0};
  std::atomic<int> asleep_{0};
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::vector<Share> shares_;
  Invoke invoke_ = nullptr;
  void* body_ = nullptr;
  std::exception_ptr exception_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> stop_{false};
};

/// QLORA_NUM_THREADS, else one thread a core.
ThreadPool& threadPool();
/// As large, and runs nothing: for rehearsals, which count the memory of operations without computing them.
ThreadPool& idlePool();

/// Lowers the calling thread's priority by a few steps, so that Node's event loop is served first.
void yieldToEventLoop();

}  // namespace qlora
