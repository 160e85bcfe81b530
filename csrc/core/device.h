// A device beside the CPU as the engine sees it: memory, and a queue for each stream. CUDA's plugin implements it
// (cuda/runtime.cu); calls cross into the plugin through virtual functions alone, so neither side links the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/memory.h"

namespace qlora {

/// Kernels and copies that are enqueued by one call.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
  virtual void launch() = 0;
};

/// A copy that runs beside a queue. Whoever drops one that no queue awaits waits for it.
class DeviceCopy {
 public:
  virtual ~DeviceCopy() = default;
};

/// What a stream enqueues to, in order. Of the stream's own thread.
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;

  /// Once, on the stream's thread, before anything else.
  virtual void begin() = 0;
  /// Copies from the host in the queue's order. `host` may be changed once this returns.
  virtual void write(void* device, const void* host, size_t bytes) = 0;
  /// Waits for everything enqueued before, and copies to the host.
  virtual void read(void* host, const void* device, size_t bytes) = 0;
  /// As write() and read(), but with pinned memory and beside the queue: begun when everything enqueued before has
  /// ended, and the copies that were begun before. The bytes on both sides are the copy's until it is awaited.
  virtual std::unique_ptr<DeviceCopy> beginWrite(void* device, const void* pinned, size_t bytes) = 0;
  virtual std::unique_ptr<DeviceCopy> beginRead(void* pinned, const void* device, size_t bytes) = 0;
  /// What is enqueued from here on begins when the copy has ended. Nobody is held up meanwhile.
  virtual void await(std::unique_ptr<DeviceCopy> copy) = 0;
  /// Waits for everything enqueued before. Throws ERR_QLORA_DEVICE where some of it failed.
  virtual void wait() = 0;
  /// What `body` enqueues, without running it; null where body has to read, write or wait.
  virtual std::unique_ptr<DeviceGraph> capture(const std::function<void()>& body) = 0;

  /// Kernels that were enqueued so far, or made part of a graph.
  int64_t kernels = 0;
};

struct DeviceDescription {
  std::string name;
  uint64_t memoryBytes = 0;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
};

/// One a process, however many streams use it. Thread-safe. `counter` counts the memory of all of them.
class Device {
 public:
  explicit Device(int index) : index(index) {}
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  virtual const DeviceDescription& description() const = 0;
  /// At this moment. Throws ERR_QLORA_DEVICE where the device cannot be used.
  virtual uint64_t freeBytes() const = 0;
  /// Aligned to 256 bytes; null where the device has none. Throws ERR_QLORA_DEVICE where something else is wrong.
  virtual void* allocate(size_t bytes) = 0;
  /// Waits for what uses it.
  virtual void release(void* pointer) = 0;
  /// As allocate() and release(), of the host's memory that the device copies from and to by itself.
  virtual void* allocatePinned(size_t bytes) = 0;
  virtual void releasePinned(void* pointer) = 0;
  virtual std::unique_ptr<DeviceQueue> makeQueue() = 0;

  const int index;
  MemoryCounter counter;
};

}  // namespace qlora
