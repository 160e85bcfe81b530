#include "core/stream.h"

#include "core/error.h"

namespace qlora {

Stream::Stream(std::shared_ptr<Memory> memory, const OpTable& ops)
    : memory_(std::move(memory)), ops_(ops), thread_([this] { work(); }) {}

void Stream::post(Task task) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) throw Error("ERR_QLORA_DISPOSED", "this model or stream was disposed of and takes no more work");
    queue_.push_back(std::move(task));
  }
  wake_.notify_one();
}

void Stream::postOperation(Task task) {
  if (recording_) {
    recording_->push_back(std::move(task));
  } else {
    post(std::move(task));
  }
}

void Stream::record() {
  if (recording_) fail("ERR_QLORA_INTERNAL", "a recording was begun within another");
  recording_ = std::make_shared<Recording>();
}

void Stream::run(std::shared_ptr<const Recording> recording) {
  post([this, recording = std::move(recording)](Context&) {
    for (const Task& task : *recording) runTask(task);
  });
}

void Stream::close() {
  std::deque<Task> dropped;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    dropped.swap(queue_);
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Stream::work() {
  yieldToEventLoop();
  while (true) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (closed_) return;
      task = std::move(queue_.front());
      queue_.pop_front();
    }
    runTask(task);
  }
}

void Stream::runTask(const Task& task) {
  Scratch scratch(*memory_);
  Context context{memory_->backing() == Backing::pages ? threadPool() : idlePool(), scratch};
  task(context);
}

}  // namespace qlora
