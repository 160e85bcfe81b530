// A stream: a thread that runs operations in the order in which they were enqueued.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "core/parallel.h"

namespace qlora {

struct OpTable;

/// Memory that an operation needs while it runs; handed back when it is done.
class Scratch {
 public:
  explicit Scratch(Memory& memory) : memory_(memory) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (const auto& [pointer, bytes] : taken_) memory_.release(pointer, bytes, MemoryClass::scratch);
  }

  void* bytes(size_t n) {
    taken_.emplace_back(memory_.allocate(n, MemoryClass::scratch), n);
    return taken_.back().first;
  }
  /// Aligned to 64 bytes, not initialized.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  /// One that hands back earlier, for an operation that works in several steps.
  Scratch nested() const { return Scratch(memory_); }

 private:
  Memory& memory_;
  std::vector<std::pair<void*, size_t>> taken_;
};

/// What an operation runs with.
struct Context {
  ThreadPool& pool;
  Scratch& scratch;
};

/// What an operation took so far: of a stream, since it was last asked.
struct OperationTime {
  int64_t calls = 0;
  double seconds = 0;
};

/// May be called again: a recorded operation is.
using Task = std::function<void(Context&)>;

/// Operations that were enqueued once, to be run in the same order, on the same tensors, as often as one likes. What
/// they wrote on the way stays allocated, so that running them again allocates scratch alone.
using Recording = std::vector<Task>;

class Stream {
 public:
  using Times = std::map<std::string_view, OperationTime>;

  Stream(std::shared_ptr<Memory> memory, const OpTable& ops);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { close(); }

  /// Throws ERR_QLORA_DISPOSED after close. A task may not throw.
  void post(Task task);
  /// As post, but for operations, which a recording keeps instead of running them.
  void postOperation(Task task);
  /// On the caller's thread; until takeRecording() its operations are recorded.
  void record();
  bool recording() const { return recording_ != nullptr; }
  std::shared_ptr<const Recording> takeRecording() { return std::move(recording_); }
  void run(std::shared_ptr<const Recording> recording);
  /// Drops what was not started, waits for what was. Idempotent.
  void close();

  Memory& memory() const { return *memory_; }
  const std::shared_ptr<Memory>& sharedMemory() const { return memory_; }
  const OpTable& ops() const { return ops_; }
  /// By the operation's name. For tasks, on the stream's own thread.
  Times& times() { return times_; }

 private:
  void work();
  void runTask(const Task& task);

  const std::shared_ptr<Memory> memory_;
  const OpTable& ops_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> queue_;
  bool closed_ = false;
  Times times_;
  std::shared_ptr<Recording> recording_;  // of the thread that enqueues
  std::thread thread_;
};

}  // namespace qlora
