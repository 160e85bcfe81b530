#include "core/stream.h"

#include "core/error.h"

namespace qlora {

Stream::Stream(std::shared_ptr<Memory> memory, const OpTable& ops, std::unique_ptr<DeviceQueue> queue)
    : memory_(std::move(memory)), ops_(ops), queue_(std::move(queue)), thread_([this] { work(); }) {}

void Stream::post(Task task) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) throw Error("ERR_QLORA_DISPOSED", "this model or stream was disposed of and takes no more work");
    tasks_.push_back(std::move(task));
  }
  wake_.notify_one();
}

void Stream::postOperation(std::shared_ptr<Operation> operation) {
  if (recording_) {
    recording_->operations.push_back(std::move(operation));
  } else {
    post([operation = std::move(operation)](Context& context) { operation->run(context); });
  }
}

void Stream::record() {
  if (recording_) fail("ERR_QLORA_INTERNAL", "a recording was begun within another");
  recording_ = std::make_shared<Recording>(memory_);
}

void Stream::run(std::shared_ptr<Recording> recording) {
  post([this, recording = std::move(recording)](Context&) { runRecording(*recording); });
}

void Stream::runRecording(Recording& recording) {
  using Stage = Recording::Stage;
  const auto runAll = [&](ScratchStore* store) {
    for (const auto& operation : recording.operations) {
      Scratch scratch(*memory_, store);
      Context context = contextOf(scratch);
      operation->run(context);
    }
  };
  // With an error among the inputs the operations pass it on one by one.
  if (!queue_ || recording.stage == Stage::noGraph || recording.hasInputError()) return runAll(nullptr);
  if (recording.stage == Stage::new_) {
    recording.stage = Stage::allocated;
    return runAll(nullptr);
  }
  if (recording.stage == Stage::allocated) {
    recording.graph = queue_->capture([&] { runAll(&recording.scratch); });
    recording.stage = recording.graph ? Stage::graph : Stage::noGraph;
    if (!recording.graph) return runAll(nullptr);
  }
  recording.graph->launch();
}

void Stream::close() {
  std::deque<Task> dropped;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    dropped.swap(tasks_);
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Stream::work() {
  yieldToEventLoop();
  if (queue_) queue_->begin();
  while (true) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (closed_) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    runTask(task);
  }
}

void Stream::runTask(const Task& task) {
  Scratch scratch(*memory_);
  Context context = contextOf(scratch);
  task(context);
}

Context Stream::contextOf(Scratch& scratch) {
  ThreadPool& pool = memory_->backing() == Backing::addresses ? idlePool() : threadPool();
  return {pool, scratch, queue_.get()};
}

}  // namespace qlora
