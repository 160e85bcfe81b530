#include "core/stream.h"

#include <algorithm>

#include "core/error.h"
#include "core/operation.h"

namespace qlora {

Stream::Stream(std::shared_ptr<Memory> memory, const OpTable& ops, std::shared_ptr<const Device> device,
               std::unique_ptr<DeviceQueue> queue, std::shared_ptr<Memory> pinned)
    : memory_(std::move(memory)),
      ops_(ops),
      device_(std::move(device)),
      queue_(std::move(queue)),
      pinned_(std::move(pinned)),
      thread_([this] { work(); }) {}

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
  std::erase_if(recordings_, [](const auto& recording) { return recording.expired(); });
  recordings_.push_back(recording_);
}

void Stream::run(std::shared_ptr<Recording> recording) {
  if (recording_) fail("ERR_QLORA_INTERNAL", "a recording cannot run within another");
  post([this, recording = std::move(recording)](Context&) { runRecording(*recording); });
}

void Stream::runRecording(Recording& recording) {
  using Stage = Recording::Stage;
  const auto forEach = [&](ScratchStore* store, auto&& body) {
    for (const auto& operation : recording.operations) {
      Scratch scratch(*memory_, store);
      Context context = contextOf(scratch);
      if (!body(*operation, context)) return;
    }
  };
  const auto runAll = [&] {
    forEach(nullptr, [](Operation& operation, Context& context) {
      operation.run(context);
      return true;
    });
  };
  if (recording.stage == Stage::fresh && queue_) {
    recording.stage = Stage::allocated;
    return runAll();
  }
  const auto hasError = [](const auto& operation) { return operation->hasError(); };
  // An error goes from operation to operation, and is gone from one that runs again.
  if (!queue_ || recording.stage == Stage::noGraph || std::ranges::any_of(recording.operations, hasError)) {
    return runAll();
  }
  try {
    if (recording.stage == Stage::allocated) {
      std::shared_ptr<const Error> error;
      recording.graph = queue_->capture([&] {
        forEach(&recording.scratch,
                [&](Operation& operation, Context& context) { return !(error = operation.start(context)); });
      });
      // A graph of less than all is none. Where memory was short, there may be more next time.
      if (!recording.graph) recording.stage = Stage::noGraph;
      if (error) recording.graph.reset();
      if (!recording.graph) {
        recording.scratch.clear();
        return runAll();
      }
      recording.stage = Stage::graph;
    }
    for (const auto& operation : recording.operations) operation->prepare();
    recording.graph->launch();
  } catch (...) {
    const auto error = currentError();
    for (const auto& operation : recording.operations) operation->fail(error);
  }
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
  // What they hold of a model must not wait until somebody lets go of the recording.
  for (const auto& weak : recordings_) {
    if (const auto recording = weak.lock()) recording->clear();
  }
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
  return {pool, scratch, queue_.get(), device_ ? &device_->description() : nullptr};
}

}  // namespace qlora
