// A tensor: a shape over storage that its stream allocates when the operation that fills it runs.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/memory.h"

namespace qlora {

class PageFile;
struct Offloaded;

/// Bytes on a stream. `data` is null until something was written there; `error` says why that failed, and every
/// operation that would read it fails likewise, up to the read that tells the user.
struct Storage {
  Storage(std::shared_ptr<Memory> memory, size_t bytes, MemoryClass memoryClass)
      : memory(std::move(memory)), bytes(bytes), memoryClass(memoryClass) {}
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  ~Storage() {
    offloaded = nullptr;  // a copy that is under way uses both memories
    if (data) memory->release(data, bytes, memoryClass);
  }

  /// On the stream's thread only.
  void allocate() {
    if (pages) fail("ERR_QLORA_INTERNAL", "an operation that cannot page writes a tensor whose bytes are in a file");
    if (where != Where::here) fail("ERR_QLORA_INTERNAL", "a tensor is written while the host keeps its bytes");
    if (!data) data = memory->allocate(bytes, memoryClass);
  }

  const std::shared_ptr<Memory> memory;
  const size_t bytes;
  const MemoryClass memoryClass;
  void* data = nullptr;
  std::shared_ptr<const Error> error;
  /// On a device: the bytes, where JavaScript wrote them and nothing has changed them since. Of small tensors only.
  std::shared_ptr<const std::vector<char>> hostCopy;
  /// Where the bytes are kept in a file instead, from pageOffset on: optimizer state only. `data` stays null.
  std::shared_ptr<PageFile> pages;
  uint64_t pageOffset = 0;
  /// Whether the device has the bytes, or the host keeps them for a while, which core/offload.h says.
  enum class Where : uint8_t { here, leaving, away, arriving } where = Where::here;
  bool isElsewhere() const { return where == Where::away || where == Where::arriving; }
  std::shared_ptr<Offloaded> offloaded;
};

constexpr int kMaxRank = 4;

/// Row-major, contiguous. Copies share the storage. An undefined tensor (no storage) stands for an argument left out.
struct Tensor {
  std::shared_ptr<Storage> storage;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};

  QLORA_INLINE bool defined() const { return storage.get() != nullptr; }
  QLORA_INLINE int64_t dim(int i) const { return shape[i < 0 ? rank + i : i]; }
  QLORA_INLINE int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  /// Elements divided by the last dimension: the rows of a matrix whose columns are the last dimension.
  QLORA_INLINE int64_t rows() const { return rank == 0 || dim(-1) == 0 ? 1 : size() / dim(-1); }

  template <class T>
  QLORA_INLINE T* data() const {
    return static_cast<T*>(storage->data);
  }
  /// Null where the argument was left out.
  template <class T>
  QLORA_INLINE T* dataOrNull() const {
    return storage ? static_cast<T*>(storage->data) : nullptr;
  }
};

}  // namespace qlora
