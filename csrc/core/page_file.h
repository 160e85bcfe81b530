// Optimizer state that may be larger than memory: kept in a file, and streamed through three slots while it is updated.
//
// No name leads to the file, so it goes with the process, however that ends. Its space is reserved when it is made: a
// full disk is an error before training starts. It is read and written by pread and pwrite and never mapped: a disk
// that fails is an error too, not a signal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace qlora {

struct PagedArray;
struct PagedRun;

class PageFile {
 public:
  /// Creates `path`, which may not exist, takes its name away, and reserves `bytes` on the disk. The slots are memory
  /// of the class optimizer, the host's where `memory` is a device's; each takes a batch of at most `slotBytes`.
  PageFile(std::string path, uint64_t bytes, size_t slotBytes, std::shared_ptr<Memory> memory);
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;
  virtual ~PageFile();

  /// Where the next `bytes` bytes lie; they are zero until they are written.
  uint64_t take(uint64_t bytes);
  /// All of `bytes` or an error. Thread-safe.
  void read(void* target, size_t bytes, uint64_t offset) const;
  void write(const void* source, size_t bytes, uint64_t offset) const;

  /// As streamPages, which a plugin's kernels come to through here.
  using Update = void (*)(void* body, char* slot, const PagedRun* runs, int64_t count);
  virtual void stream(const std::vector<Tensor>& params, const PagedArray* arrays, int arrayCount, int64_t piece,
                      Update update, void* body);

  size_t slotBytes() const { return slotBytes_; }
  char* slot(int64_t i) const { return slots_ + static_cast<size_t>(i) * slotBytes_; }

 private:
  const std::string path_;
  const uint64_t bytes_;
  const size_t slotBytes_;
  const std::shared_ptr<Memory> memory_;
  int descriptor_ = -1;  // stays so in a rehearsal
  uint64_t taken_ = 0;
  char* slots_ = nullptr;
};

constexpr int kPageSlots = 3;
/// Ranges in a file and in a slot begin at multiples of it.
constexpr size_t kPageAlignment = 64;

/// State beside a list of parameters: an item of `itemBytes` for every `elements` elements of each.
struct PagedArray {
  const std::vector<Tensor>* list;
  int64_t elements, itemBytes;
};
constexpr int kMostPagedArrays = 6;

/// Elements [begin, begin + count) of a parameter, and where in the slot each array's items of these begin.
struct PagedRun {
  int64_t tensor, begin, count;
  size_t at[kMostPagedArrays];
};

/// Calls update(body, slot, runs, count) for batch after batch of all elements of params, in order, on the calling
/// thread. What the slot holds was read from the arrays' file, ahead of use by a thread of its own, and is written
/// back. Runs are cut at multiples of `piece` elements. A failure after the first batch leaves the step half done: it
/// is passed on to params and arrays, so that nothing computes with them or saves them, and thrown.
void streamPages(PageFile& file, const std::vector<Tensor>& params, const PagedArray* arrays, int arrayCount,
                 int64_t piece, void (*update)(void* body, char* slot, const PagedRun* runs, int64_t count),
                 void* body);

}  // namespace qlora
