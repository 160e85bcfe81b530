#include "cuda/emulated/api.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

/// What the pretended device holds, and how many copies and kernels use it at this moment.
struct DeviceMemory {
  std::mutex mutex;
  std::map<void*, size_t> segments;
  size_t used = 0;
  int users = 0;

  void protect(int protection) {
    for (const auto& [start, bytes] : segments) mprotect(start, bytes, protection);
  }
};

DeviceMemory& deviceMemory() {
  static auto& memory = *new DeviceMemory;
  return memory;
}

/// Numbers of the environment's.
std::vector<size_t> setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  if (!text || !*text) return {otherwise};
  std::vector<size_t> numbers;
  for (char* end = nullptr; *text; text = *end ? end + 1 : end) numbers.push_back(std::strtoull(text, &end, 10));
  return numbers;
}

size_t totalBytes() { return setting("QLORA_CUDA_MEMORY", size_t{64} << 30)[0]; }
std::vector<size_t> capabilities() { return setting("QLORA_CUDA_CAPABILITY", 90); }

}  // namespace

/// A stream's copies between host and device, which wait to be waited for.
struct EmulatedStream {
  struct Copy {
    char* to;
    const char* from;  // null: the copy did not wait for what it copies
    size_t bytes;

    bool touches(const char* begin, size_t length) const {
      const auto overlaps = [&](const char* start) { return start && start < begin + length && begin < start + bytes; };
      return overlaps(to) || overlaps(from);
    }
  };

  std::deque<Copy> waiting;
  uint64_t arrived = 0;  // copies
  uint64_t given = 0;    // copies and kernels
  bool hasKernels = false;
  /// A stream that this one waited for or that waited for this one, and how much of what it was given.
  std::shared_ptr<EmulatedStream> other;
  uint64_t awaited = 0;

  bool isBehind() const { return other && !hasKernels && awaited < other->given; }

  void add(char* to, const char* from, size_t bytes) {
    const bool isFree = std::none_of(waiting.begin(), waiting.end(), [&](auto& c) { return c.touches(to, bytes); });
    if (isFree) poison(to, bytes);
    waiting.push_back({to, isBehind() ? nullptr : from, bytes});
    ++given;
  }

  void arriveUpTo(uint64_t copies) {
    if (arrived >= copies || waiting.empty()) return;
    const qlora::emulated::MemoryAccess access;
    for (; arrived < copies && !waiting.empty(); ++arrived, waiting.pop_front()) {
      const Copy& copy = waiting.front();
      copy.from ? static_cast<void>(std::memcpy(copy.to, copy.from, copy.bytes)) : poison(copy.to, copy.bytes);
    }
  }
  void arriveAll() { arriveUpTo(arrived + waiting.size()); }

 private:
  static void poison(char* at, size_t bytes) {
    const qlora::emulated::MemoryAccess access;
    std::memset(at, 0xff, bytes);
  }
};

struct EmulatedEvent {
  std::shared_ptr<EmulatedStream> stream;  // null: it was never recorded
  uint64_t copies = 0, given = 0;          // of the stream, when it was
};

namespace {

/// All streams there are. Whoever looks into one holds the mutex.
struct Streams {
  std::mutex mutex;
  std::map<cudaStream_t, std::shared_ptr<EmulatedStream>> all;

  /// As what frees memory does.
  void arriveAll() {
    std::lock_guard lock(mutex);
    for (const auto& [handle, stream] : all) stream->arriveAll();
  }
};

Streams& streams() {
  static auto& streams = *new Streams;
  return streams;
}

}  // namespace

namespace qlora::emulated {

cudaError_t answer(const char* name) {
  static std::mutex mutex;
  static const char* const wanted = std::getenv("QLORA_CUDA_FAIL");
  static const std::string text = wanted ? wanted : "", function = text.substr(0, text.find(':'));
  static size_t left = text.size() > function.size() ? std::stoul(text.substr(function.size() + 1)) : 0;
  std::lock_guard lock(mutex);
  if (left > 0 && function == name) --left;
  return text.empty() || left > 0 ? cudaSuccess : cudaErrorIllegalAddress;
}

MemoryAccess::MemoryAccess() {
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  if (memory.users++ == 0) memory.protect(PROT_READ | PROT_WRITE);
}
MemoryAccess::~MemoryAccess() {
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  if (--memory.users == 0) memory.protect(PROT_NONE);
}

}  // namespace qlora::emulated

using qlora::emulated::answer;

cudaError_t cudaGetDeviceCount(int* count) {
  if (const cudaError_t error = answer(__func__)) return error;
  *count = static_cast<int>(capabilities().size());
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (const cudaError_t error = answer(__func__)) return error;
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "CUDA, emulated on the CPU");
  properties->totalGlobalMem = totalBytes();
  const size_t capability = capabilities()[static_cast<size_t>(device)];
  properties->major = static_cast<int>(capability / 10);
  properties->minor = static_cast<int>(capability % 10);
  properties->multiProcessorCount = static_cast<int>(setting("QLORA_CUDA_MULTIPROCESSORS", 4)[0]);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (const cudaError_t error = answer(__func__)) return error;
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  if (memory.used + bytes > totalBytes()) return cudaErrorMemoryAllocation;
  const int protection = memory.users ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* start = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  memory.segments.emplace(start, bytes);
  memory.used += bytes;
  *pointer = start;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (const cudaError_t error = answer(__func__)) return error;
  streams().arriveAll();
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  const auto segment = memory.segments.find(pointer);
  munmap(segment->first, segment->second);
  memory.used -= segment->second;
  memory.segments.erase(segment);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  if (const cudaError_t error = answer(__func__)) return error;
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  *total = totalBytes();
  *free = *total - memory.used;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  if (const cudaError_t error = answer(__func__)) return error;
  *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* pointer) {
  streams().arriveAll();
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (const cudaError_t error = answer(__func__)) return error;
  if (kind == cudaMemcpyDeviceToDevice) {
    qlora::emulated::submit(stream, [=] { std::memcpy(to, from, bytes); });
  } else {
    std::lock_guard lock(streams().mutex);
    stream->add(static_cast<char*>(to), static_cast<const char*>(from), bytes);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = answer(__func__)) return error;
  qlora::emulated::submit(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

namespace {

/// Of the thread that captures: a stream has one of its own.
thread_local std::unique_ptr<EmulatedGraph> captured;

}  // namespace

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  if (const cudaError_t error = answer(__func__)) return error;
  captured = std::make_unique<EmulatedGraph>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  if (const cudaError_t error = answer(__func__)) return error;
  *graph = captured.release();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (const cudaError_t error = answer(__func__)) return error;
  for (const auto& work : *graph) qlora::emulated::submit(stream, work);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (const cudaError_t error = answer(__func__)) return error;
  *executable = new EmulatedGraph(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  if (const cudaError_t error = answer(__func__)) return error;
  auto made = std::make_shared<EmulatedStream>();
  *stream = made.get();
  std::lock_guard lock(streams().mutex);
  streams().all.emplace(*stream, std::move(made));
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!stream) return cudaSuccess;
  std::lock_guard lock(streams().mutex);
  stream->arriveAll();
  stream->other = nullptr;
  streams().all.erase(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = answer(__func__)) return error;
  std::lock_guard lock(streams().mutex);
  stream->arriveAll();
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const cudaError_t error = answer(__func__)) return error;
  std::lock_guard lock(streams().mutex);
  event->stream->arriveUpTo(event->copies);
  stream->other = event->stream;
  stream->awaited = event->given;
  if (stream->hasKernels && !event->stream->other) event->stream->other = streams().all.at(stream);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  if (const cudaError_t error = answer(__func__)) return error;
  *event = new EmulatedEvent;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t error = answer(__func__)) return error;
  std::lock_guard lock(streams().mutex);
  *event = {streams().all.at(stream), stream->arrived + stream->waiting.size(), stream->given};
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = answer(__func__)) return error;
  std::lock_guard lock(streams().mutex);
  if (event->stream) event->stream->arriveUpTo(event->copies);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return answer(__func__); }
cudaError_t cudaGetLastError() { return answer(__func__); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
  }
  return "unrecognized error code";
}

void qlora::emulated::submit(cudaStream_t stream, std::function<void()> work) {
  if (captured) {
    captured->push_back(std::move(work));
    return;
  }
  {
    std::lock_guard lock(streams().mutex);
    stream->arriveAll();
    stream->hasKernels = true;
    ++stream->given;
  }
  MemoryAccess access;
  work();
}
