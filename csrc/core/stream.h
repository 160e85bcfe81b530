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

#include "core/device.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/recording.h"
#include "core/scratch.h"

namespace qlora {

struct OpTable;

/// What an operation runs with.
struct Context {
  ThreadPool& pool;
  Scratch& scratch;
  DeviceQueue* queue = nullptr;               // of a device; null on the CPU and in a rehearsal
  const DeviceDescription* device = nullptr;  // null on the CPU
};

/// What an operation took so far: of a stream, since it was last asked.
struct OperationTime {
  int64_t calls = 0;
  double seconds = 0;
};

using Task = std::function<void(Context&)>;

class Stream {
 public:
  using Times = std::map<std::string_view, OperationTime>;

  /// `device` where it is one's, `queue` where it computes, and `pinned`, of the host's memory, what its tensors may be
  /// moved to.
  Stream(std::shared_ptr<Memory> memory, const OpTable& ops, std::shared_ptr<const Device> device = nullptr,
         std::unique_ptr<DeviceQueue> queue = nullptr, std::shared_ptr<Memory> pinned = nullptr);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { close(); }

  /// Throws ERR_QLORA_DISPOSED after close. A task may not throw.
  void post(Task task);
  /// As post, but for operations, which a recording keeps instead of running them.
  void postOperation(std::shared_ptr<Operation> operation);
  /// On the caller's thread; until takeRecording() its operations are recorded.
  void record();
  bool recording() const { return recording_ != nullptr; }
  std::shared_ptr<Recording> takeRecording() { return std::move(recording_); }
  void run(std::shared_ptr<Recording> recording);
  /// Drops what was not started, waits for what was. Idempotent.
  void close();

  Memory& memory() const { return *memory_; }
  const std::shared_ptr<Memory>& sharedMemory() const { return memory_; }
  /// Null on the CPU.
  const std::shared_ptr<Memory>& pinned() const { return pinned_; }
  const OpTable& ops() const { return ops_; }
  /// By the operation's name. For tasks, on the stream's own thread.
  Times& times() { return times_; }

 private:
  void work();
  void runTask(const Task& task);
  void runRecording(Recording& recording);
  Context contextOf(Scratch& scratch);

  const std::shared_ptr<Memory> memory_;
  const OpTable& ops_;
  const std::shared_ptr<const Device> device_;
  const std::unique_ptr<DeviceQueue> queue_;
  const std::shared_ptr<Memory> pinned_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> tasks_;
  bool closed_ = false;
  Times times_;
  std::shared_ptr<Recording> recording_;  // of the thread that enqueues
  std::vector<std::weak_ptr<Recording>> recordings_;
  std::thread thread_;
};

}  // namespace qlora
