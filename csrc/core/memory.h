// Memory of one stream: every byte counted by class, and served from segments of large pages that are kept and reused.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace qlora {

enum class MemoryClass : uint8_t { weights, adapters, optimizer, activations, scratch };
constexpr int kMemoryClasses = 5;
constexpr const char* kMemoryClassNames[kMemoryClasses] = {"weights", "adapters", "optimizer", "activations",
                                                           "scratch"};

class Device;

/// What stands behind the bytes: pages, addresses alone, a device's memory, or pages of the host that a device copies
/// from and to by itself (pinned). Addresses are for a rehearsal, which counts what a run would take without taking it:
/// reading there gives zeros, and what is written costs a page.
enum class Backing : uint8_t { pages, addresses, device, pinned };

/// Where what a stream computes with is. A rehearsal for a device has addresses for it.
enum class MemoryPlace : uint8_t { host, device };
constexpr int kMemoryPlaces = 2;

/// Bytes in use now and at most, in total and by class. Safe to read from any thread.
class MemoryCounter {
 public:
  void add(MemoryClass c, int64_t bytes);

  int64_t live() const { return live_.load(std::memory_order_relaxed); }
  int64_t peak() const { return peak_.load(std::memory_order_relaxed); }
  int64_t live(int c) const { return byClass_[c].load(std::memory_order_relaxed); }
  int64_t peak(int c) const { return peakByClass_[c].load(std::memory_order_relaxed); }
  void resetPeak();

 private:
  std::atomic<int64_t> live_{0}, peak_{0};
  std::array<std::atomic<int64_t>, kMemoryClasses> byClass_{}, peakByClass_{};
};

/// All CPU memory of the process, rehearsals left out. A device counts its own.
MemoryCounter& processMemory();

/// What becomes of the pages of a freed block: kept for the next step, so that one that repeats its shapes maps none,
/// or handed back to the system.
enum class FreedPages : uint8_t { kept, returned };

/// Best fit with coalescing over large segments; `trim` hands wholly free segments back. `device` is null but for
/// Backing::device and Backing::pinned.
class SegmentAllocator {
 public:
  SegmentAllocator(Backing backing, FreedPages freed, Device* device)
      : backing_(backing), freed_(freed), device_(device) {}
  SegmentAllocator(const SegmentAllocator&) = delete;
  SegmentAllocator& operator=(const SegmentAllocator&) = delete;
  ~SegmentAllocator();

  void* allocate(size_t bytes);  // aligned to 64, on a device to 256; null where there is none
  void release(void* pointer);
  void trim();
  size_t mappedBytes() const;  // in use or kept

 private:
  struct Block {
    size_t bytes;
    bool free;
    bool first;  // of its segment
  };
  using Blocks = std::map<char*, Block>;

  char* addSegment(size_t bytes);
  void* map(size_t bytes) const;
  void unmap(char* start, size_t bytes) const;
  void insertFree(Blocks::iterator block);
  void eraseFree(Blocks::iterator block);

  const Backing backing_;
  const FreedPages freed_;
  Device* const device_;
  Blocks blocks_;                            // by address
  std::set<std::pair<size_t, char*>> free_;  // by size, then address
  std::map<char*, size_t> segments_;
};

/// The memory of one stream. Allocation throws ERR_QLORA_OUT_OF_MEMORY, never std::bad_alloc. Thread-safe. What kernels
/// call is virtual, so that those of a plugin come here without being linked to it.
class Memory {
 public:
  /// Pages or addresses.
  explicit Memory(Backing backing, MemoryPlace place = MemoryPlace::host) : Memory(backing, place, nullptr) {}
  /// The device's, or the host's that is pinned for it.
  Memory(std::shared_ptr<Device> device, MemoryPlace place)
      : Memory(place == MemoryPlace::device ? Backing::device : Backing::pinned, place, std::move(device)) {}
  virtual ~Memory() = default;

  virtual void* allocate(size_t bytes, MemoryClass c);
  virtual void release(void* pointer, size_t bytes, MemoryClass c);

  /// Allocations that would take the live bytes above it fail; 0 is no limit.
  void setLimit(int64_t bytes) { limit_.store(bytes, std::memory_order_relaxed); }
  void trim();
  /// Bytes that segments have taken, whether or not tensors are in them.
  int64_t mappedBytes();
  MemoryCounter& counter() { return counter_; }
  Backing backing() const { return backing_; }
  MemoryPlace place() const { return place_; }

 private:
  Memory(Backing backing, MemoryPlace place, std::shared_ptr<Device> device)
      : backing_(backing),
        place_(place),
        device_(std::move(device)),
        transient_(backing, FreedPages::kept, device_.get()),
        lasting_(backing, FreedPages::returned, device_.get()) {}

  void count(MemoryClass c, int64_t bytes);
  bool inSegments() const;
  void* fromSegments(size_t bytes, MemoryClass c);
  void trimSegments();
  SegmentAllocator& segmentsOf(MemoryClass c);
  std::string facts(int64_t limit) const;

  const Backing backing_;
  const MemoryPlace place_;
  const std::shared_ptr<Device> device_;
  MemoryCounter counter_;
  std::atomic<int64_t> limit_{0};
  std::mutex mutex_;
  SegmentAllocator transient_, lasting_;
};

}  // namespace qlora
