// Memory that an operation needs while it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "core/memory.h"

namespace qlora {

/// Scratch that belongs to one recording for good: a graph of its kernels has the addresses inside.
class ScratchStore {
 public:
  explicit ScratchStore(std::shared_ptr<Memory> memory) : memory_(std::move(memory)) {}
  ScratchStore(const ScratchStore&) = delete;
  ScratchStore& operator=(const ScratchStore&) = delete;
  ~ScratchStore() { clear(); }

  void clear() {
    for (const auto& [pointer, bytes] : all_) memory_->release(pointer, bytes, MemoryClass::scratch);
    all_.clear();
    free_.clear();
  }

  void* take(size_t bytes) {
    const auto fit = free_.lower_bound(bytes);
    // Not a far larger one, which the next may need.
    if (fit != free_.end() && fit->first <= 2 * bytes) {
      void* pointer = fit->second;
      free_.erase(fit);
      return pointer;
    }
    void* pointer = memory_->allocate(bytes, MemoryClass::scratch);
    all_.emplace(pointer, bytes);
    return pointer;
  }
  void give(void* pointer) { free_.emplace(all_.at(pointer), pointer); }

 private:
  const std::shared_ptr<Memory> memory_;
  std::map<void*, size_t> all_;
  std::multimap<size_t, void*> free_;
};

/// Handed back when the operation is done.
class Scratch {
 public:
  /// Out of `store` where there is one.
  explicit Scratch(Memory& memory, ScratchStore* store = nullptr) : memory_(memory), store_(store) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (const auto& [pointer, bytes] : taken_) {
      if (store_) {
        store_->give(pointer);
      } else {
        memory_.release(pointer, bytes, MemoryClass::scratch);
      }
    }
  }

  void* bytes(size_t n) {
    taken_.emplace_back(store_ ? store_->take(n) : memory_.allocate(n, MemoryClass::scratch), n);
    return taken_.back().first;
  }
  /// Aligned to 64 bytes, on a device to 256, not initialized.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  /// One that hands back earlier, for an operation that works in several steps.
  Scratch nested() const { return Scratch(memory_, store_); }

 private:
  Memory& memory_;
  ScratchStore* const store_;
  std::vector<std::pair<void*, size_t>> taken_;
};

}  // namespace qlora
