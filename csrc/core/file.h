// Files read by place and written so that a reader finds the old one or the whole new one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/page_file.h"
#include "core/parallel.h"

namespace qlora {

/// A regular file, open for reading. Never mapped: of a file that is cut short meanwhile, reading fails with an error.
class InputFile {
 public:
  explicit InputFile(std::string path);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();

  /// Bytes when it was opened.
  uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }

  /// All of `bytes` or an error. Thread-safe.
  void read(void* target, size_t bytes, uint64_t offset) const;

 private:
  const std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

/// Reads `bytes` from `offset` on every thread of the pool.
void readParallel(const InputFile& file, void* target, size_t bytes, uint64_t offset, ThreadPool& pool);

/// The same, to memory of a device, piece by piece; ERR_QLORA_NON_FINITE as readFiniteParallel's where `dtype` is given.
void readIntoDevice(const InputFile& file, DeviceQueue& queue, void* target, size_t bytes, uint64_t offset,
                    const DType* dtype, ThreadPool& pool);

/// Copies bytes of a file into one of paged state.
void readIntoPages(const InputFile& file, const PageFile& pages, uint64_t pageOffset, size_t bytes, uint64_t offset);

/// The same as readParallel, and ERR_QLORA_NON_FINITE where an element of the floating-point type `dtype` is infinite
/// or NaN. `elementsBefore` of the tensor were read before, for the message.
void readFiniteParallel(const InputFile& file, void* target, size_t bytes, uint64_t offset, DType dtype,
                        ThreadPool& pool, size_t elementsBefore = 0);

/// Bytes in memory, of a device where queue is set; or, where pages is set, in a file of paged state.
struct FilePart {
  const void* data;
  size_t bytes;
  const PageFile* pages = nullptr;
  uint64_t pageOffset = 0;
  DeviceQueue* queue = nullptr;
};

/// Writes the parts one after the other to `temporary` (which may not exist, in the same folder), syncs it, renames it
/// to `path` and syncs the folder. On an error the temporary file is gone and an earlier `path` is as it was.
void writeFile(const std::string& path, const std::string& temporary, const std::vector<FilePart>& parts);

}  // namespace qlora
