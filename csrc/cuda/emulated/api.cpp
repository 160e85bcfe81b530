#include "cuda/emulated/api.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

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

/// A number of the environment's: what tests want the device to be like.
size_t setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

size_t totalBytes() { return setting("QLORA_CUDA_MEMORY", size_t{64} << 30); }

}  // namespace

namespace qlora::emulated {

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

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "CUDA, emulated on the CPU");
  properties->totalGlobalMem = totalBytes();
  properties->major = static_cast<int>(setting("QLORA_CUDA_CAPABILITY", 90) / 10);
  properties->minor = static_cast<int>(setting("QLORA_CUDA_CAPABILITY", 90) % 10);
  properties->multiProcessorCount = 4;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
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
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  const auto segment = memory.segments.find(pointer);
  munmap(segment->first, segment->second);
  memory.used -= segment->second;
  memory.segments.erase(segment);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  DeviceMemory& memory = deviceMemory();
  std::lock_guard lock(memory.mutex);
  *total = totalBytes();
  *free = *total - memory.used;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  qlora::emulated::submit([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  qlora::emulated::submit([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

namespace {

/// Of the thread that captures: a stream has one of its own.
thread_local std::unique_ptr<EmulatedGraph> captured;

}  // namespace

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  captured = std::make_unique<EmulatedGraph>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = captured.release();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const auto& work : *graph) qlora::emulated::submit(work);
  return cudaSuccess;
}

void qlora::emulated::submit(std::function<void()> work) {
  if (captured) {
    captured->push_back(std::move(work));
    return;
  }
  MemoryAccess access;
  work();
}
