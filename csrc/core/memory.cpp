#include "core/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "core/device.h"
#include "core/error.h"

namespace qlora {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kDeviceAlignment = 256;
constexpr size_t kSegmentBytes = size_t{64} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

size_t roundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

void raise(std::atomic<int64_t>& peak, int64_t value) {
  int64_t seen = peak.load(std::memory_order_relaxed);
  while (seen < value && !peak.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

}  // namespace

void MemoryCounter::add(MemoryClass c, int64_t bytes) {
  const int i = static_cast<int>(c);
  raise(peak_, live_.fetch_add(bytes, std::memory_order_relaxed) + bytes);
  raise(peakByClass_[i], byClass_[i].fetch_add(bytes, std::memory_order_relaxed) + bytes);
}

void MemoryCounter::resetPeak() {
  peak_.store(live(), std::memory_order_relaxed);
  for (int i = 0; i < kMemoryClasses; ++i) peakByClass_[i].store(live(i), std::memory_order_relaxed);
}

MemoryCounter& processMemory() {
  static MemoryCounter counter;
  return counter;
}

SegmentAllocator::~SegmentAllocator() {
  for (const auto& [start, bytes] : segments_) unmap(start, bytes);
}

void* SegmentAllocator::map(size_t bytes) const {
  if (device_) return backing_ == Backing::device ? device_->allocate(bytes) : device_->allocatePinned(bytes);
  const int reserve = backing_ == Backing::pages ? 0 : MAP_NORESERVE;
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | reserve, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  // Advice: where it is refused, pages are merely smaller.
  if (backing_ == Backing::pages) madvise(start, bytes, MADV_HUGEPAGE);
  return start;
}

void SegmentAllocator::unmap(char* start, size_t bytes) const {
  if (device_) return backing_ == Backing::device ? device_->release(start) : device_->releasePinned(start);
  munmap(start, bytes);
}

char* SegmentAllocator::addSegment(size_t bytes) {
  bytes = std::max(kSegmentBytes, roundUp(bytes, kHugePage));
  void* start = map(bytes);
  if (!start) return nullptr;
  char* address = static_cast<char*>(start);
  segments_.emplace(address, bytes);
  insertFree(blocks_.emplace(address, Block{bytes, true, true}).first);
  return address;
}

void SegmentAllocator::insertFree(Blocks::iterator block) { free_.emplace(block->second.bytes, block->first); }
void SegmentAllocator::eraseFree(Blocks::iterator block) { free_.erase({block->second.bytes, block->first}); }

void* SegmentAllocator::allocate(size_t bytes) {
  bytes = roundUp(std::max<size_t>(bytes, 1), device_ ? kDeviceAlignment : kAlignment);
  auto fit = free_.lower_bound({bytes, nullptr});
  if (fit == free_.end()) {
    if (!addSegment(bytes)) return nullptr;
    fit = free_.lower_bound({bytes, nullptr});
  }
  const auto block = blocks_.find(fit->second);
  free_.erase(fit);
  if (block->second.bytes > bytes) {
    const Block rest{block->second.bytes - bytes, true, false};
    block->second.bytes = bytes;
    insertFree(blocks_.emplace(block->first + bytes, rest).first);
  }
  block->second.free = false;
  return block->first;
}

void SegmentAllocator::release(void* pointer) {
  auto block = blocks_.find(static_cast<char*>(pointer));
  block->second.free = true;
  const auto next = std::next(block);
  if (next != blocks_.end() && next->second.free && !next->second.first) {
    eraseFree(next);
    block->second.bytes += next->second.bytes;
    blocks_.erase(next);
  }
  if (!block->second.first) {
    const auto previous = std::prev(block);
    if (previous->second.free) {
      eraseFree(previous);
      previous->second.bytes += block->second.bytes;
      blocks_.erase(block);
      block = previous;
    }
  }
  insertFree(block);
  if (freed_ == FreedPages::kept || device_) return;
  const auto start = reinterpret_cast<uintptr_t>(block->first);
  const size_t begin = roundUp(start, kHugePage), end = (start + block->second.bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

size_t SegmentAllocator::mappedBytes() const {
  size_t sum = 0;
  for (const auto& [start, bytes] : segments_) sum += bytes;
  return sum;
}

void SegmentAllocator::trim() {
  for (auto segment = segments_.begin(); segment != segments_.end();) {
    const auto block = blocks_.find(segment->first);
    if (block->second.free && block->second.bytes == segment->second) {
      eraseFree(block);
      blocks_.erase(block);
      unmap(segment->first, segment->second);
      segment = segments_.erase(segment);
    } else {
      ++segment;
    }
  }
}

// AddressSanitizer does not see where in a segment one tensor ends.
bool Memory::inSegments() const {
#ifdef QLORA_NO_SEGMENTS
  return backing_ != Backing::pages;
#else
  return true;
#endif
}

// What lives from step to step would split the segments of what does not. Large pages count there, too: a token reads
// all weights, and in pages of 4 KiB finding them takes as long as reading them.
SegmentAllocator& Memory::segmentsOf(MemoryClass c) {
  return c == MemoryClass::activations || c == MemoryClass::scratch ? transient_ : lasting_;
}

void Memory::count(MemoryClass c, int64_t bytes) {
  counter_.add(c, bytes);
  if (backing_ == Backing::pages || backing_ == Backing::pinned) processMemory().add(c, bytes);
  if (backing_ == Backing::device) device_->counter.add(c, bytes);
}

// A device gives what free segments hold only after they were handed back, and what several streams leave over only so.
void* Memory::fromSegments(size_t bytes, MemoryClass c) {
  std::lock_guard lock(mutex_);
  try {
    void* pointer = segmentsOf(c).allocate(bytes);
    if (pointer || !device_) return pointer;
    trimSegments();
    return segmentsOf(c).allocate(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

std::string Memory::facts(int64_t limit) const {
  std::string text = limit ? ", the limit is " + std::to_string(limit) : "";
  try {
    if (backing_ == Backing::device) text += ", the device has " + std::to_string(device_->freeBytes()) + " free";
  } catch (const Error&) {
    // What is reported is why memory is wanted.
  }
  return text;
}

void* Memory::allocate(size_t bytes, MemoryClass c) {
  const int64_t limit = limit_.load(std::memory_order_relaxed);
  const int64_t live = counter_.live();
  void* pointer = nullptr;
  if (limit == 0 || live + static_cast<int64_t>(bytes) <= limit) {
    pointer = inSegments() ? fromSegments(bytes, c)
                           : std::aligned_alloc(kAlignment, roundUp(std::max<size_t>(bytes, 1), kAlignment));
  }
  if (!pointer) {
    const bool pinned = backing_ == Backing::pinned;
    char message[256];
    std::snprintf(message, sizeof message, "out of memory: %zu bytes of %s were wanted%s, %lld bytes are in use%s",
                  bytes, kMemoryClassNames[static_cast<int>(c)], pinned ? " in the host's pinned memory" : "",
                  static_cast<long long>(live), facts(limit).c_str());
    throw Error("ERR_QLORA_OUT_OF_MEMORY", message,
                pinned ? "Use a smaller batchSize or maxLength, or leave activationOffloading out."
                       : "Use a smaller batchSize or maxLength, turn gradientCheckpointing on, or free other models.");
  }
  count(c, static_cast<int64_t>(bytes));
  return pointer;
}

void Memory::release(void* pointer, size_t bytes, MemoryClass c) {
  if (inSegments()) {
    std::lock_guard lock(mutex_);
    segmentsOf(c).release(pointer);
  } else {
    std::free(pointer);
  }
  count(c, -static_cast<int64_t>(bytes));
}

void Memory::trim() {
  std::lock_guard lock(mutex_);
  trimSegments();
}

int64_t Memory::mappedBytes() {
  std::lock_guard lock(mutex_);
  return static_cast<int64_t>(transient_.mappedBytes() + lasting_.mappedBytes());
}

void Memory::trimSegments() {
  transient_.trim();
  lasting_.trim();
}

}  // namespace qlora
