#include "core/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/system_call.h"

namespace qlora {

namespace {

// Large enough to keep a disk busy, small enough to spread one tensor over the threads.
constexpr size_t kChunk = size_t{4} << 20;

[[noreturn]] void readFailed(const std::string& path, const std::string& what) {
  throw Error("ERR_QLORA_READ_FAILED", path + ": " + what,
              "Check the disk and the permissions, and that nothing changes the file meanwhile.");
}

std::string folderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

/// A file being written; closed and removed unless it was renamed.
class OutputFile {
 public:
  OutputFile(const std::string& path, const std::string& temporary, uint64_t wanted)
      : path_(path), temporary_(temporary), wanted_(wanted) {
    if (temporary.find('\0') != std::string::npos) {
      errno = EINVAL;
      fail("create a file beside it");
    }
    descriptor_ = retry([&] { return open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); });
    if (descriptor_ < 0) fail("create a file beside it");
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (descriptor_ >= 0) close(descriptor_);
    if (!renamed_) unlink(temporary_.c_str());
  }

  void write(const FilePart& part) {
    const char* data = static_cast<const char*>(part.data);
    if (!part.pages && !part.queue) return write(data, part.bytes);
    const std::unique_ptr<char[]> chunk(new char[std::min(part.bytes, kChunk)]);
    for (size_t done = 0; done < part.bytes; done += kChunk) {
      const size_t n = std::min(part.bytes - done, kChunk);
      if (part.pages) {
        part.pages->read(chunk.get(), n, part.pageOffset + done);
      } else {
        part.queue->read(chunk.get(), data + done, n);
      }
      write(chunk.get(), n);
    }
  }

  void write(const char* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      const size_t n = std::min(bytes - done, kChunk);
      const ssize_t written = retry([&] { return ::write(descriptor_, data + done, n); });
      if (written < 0) fail("write it");
      if (written == 0) {
        errno = EIO;
        fail("write it");
      }
      done += static_cast<size_t>(written);
    }
  }

  void commit() {
    if (retry([&] { return fsync(descriptor_); }) < 0) fail("sync it");
    // close frees the descriptor even where it fails
    if (const int descriptor = std::exchange(descriptor_, -1); close(descriptor) < 0 && errno != EINTR)
      fail("close it");
    if (retry([&] { return std::rename(temporary_.c_str(), path_.c_str()); }) < 0) fail("rename the new file to it");
    renamed_ = true;
    syncFolder();
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    const int error = errno;
    const bool full = isDiskFull(error);
    throw Error(
        full ? "ERR_QLORA_DISK_FULL" : "ERR_QLORA_WRITE_FAILED",
        path_ + ": cannot " + what + ": " + describe(error) + " (the file takes " + std::to_string(wanted_) + " bytes)",
        std::string(full ? "Free space on this disk or write elsewhere"
                         : "Check the folder, its permissions and the disk") +
            (renamed_ ? "; the new file is in place, but a power cut may still undo it."
                      : "; what was there before is untouched."));
  }

  void syncFolder() const {
    const int folder = retry([&] { return open(folderOf(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
    if (folder < 0) fail("open its folder");
    const int result = retry([&] { return fsync(folder); });
    const int error = errno;
    close(folder);
    // Some network file systems cannot sync a folder and say so by EINVAL.
    errno = error;
    if (result < 0 && error != EINVAL) fail("sync its folder");
  }

  const std::string& path_;
  const std::string& temporary_;
  const uint64_t wanted_;
  int descriptor_ = -1;
  bool renamed_ = false;
};

/// Index of the first 16- or 32-bit float whose exponent is all ones, or count.
template <class Bits>
size_t firstNotFinite(const void* data, size_t count, Bits exponent) {
  const Bits* x = static_cast<const Bits*>(data);
  constexpr size_t kStep = 4096;
  for (size_t i = 0; i < count; i += kStep) {
    const size_t end = std::min(count, i + kStep);
    Bits bad = 0;
    for (size_t j = i; j < end; ++j) bad |= (x[j] & exponent) == exponent;
    if (!bad) continue;
    while ((x[i] & exponent) != exponent) ++i;
    return i;
  }
  return count;
}

template <class Chunk>
void forChunks(size_t bytes, ThreadPool& pool, Chunk&& chunk) {
  pool.parallelFor(static_cast<int64_t>((bytes + kChunk - 1) / kChunk), [&](int64_t i, int) {
    const size_t at = static_cast<size_t>(i) * kChunk;
    chunk(at, std::min(kChunk, bytes - at));
  });
}

}  // namespace

InputFile::InputFile(std::string path) : path_(std::move(path)) {
  if (path_.find('\0') != std::string::npos) readFailed(path_.c_str(), "a path cannot hold a zero byte");
  // Without O_NONBLOCK, opening a named pipe would wait for its writer.
  descriptor_ = retry([&] { return open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  if (descriptor_ < 0 && (errno == ENOENT || errno == ENOTDIR)) {
    throw Error("ERR_QLORA_FILE_NOT_FOUND", path_ + ": there is no such file", "Check the path.");
  }
  if (descriptor_ < 0) readFailed(path_, "cannot open it: " + describe(errno));
  struct stat status;
  const bool known = fstat(descriptor_, &status) == 0;
  if (!known || !S_ISREG(status.st_mode)) {
    const std::string why = known ? "it is no regular file" : "cannot read its size: " + describe(errno);
    close(descriptor_);
    readFailed(path_, why);
  }
  size_ = static_cast<uint64_t>(status.st_size);
}

InputFile::~InputFile() { close(descriptor_); }

void InputFile::read(void* target, size_t bytes, uint64_t offset) const {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = retry([&] {
      return pread(descriptor_, static_cast<char*>(target) + done, std::min(bytes - done, kChunk),
                   static_cast<off_t>(offset + done));
    });
    if (n < 0) readFailed(path_, "cannot read it: " + describe(errno));
    if (n == 0) {
      struct stat status;
      const uint64_t now = fstat(descriptor_, &status) == 0 ? static_cast<uint64_t>(status.st_size) : offset + done;
      readFailed(path_, "it was cut short after it was opened: bytes up to " + std::to_string(offset + bytes) +
                            " were wanted, it has " + std::to_string(now) + " now");
    }
    done += static_cast<size_t>(n);
  }
}

void readParallel(const InputFile& file, void* target, size_t bytes, uint64_t offset, ThreadPool& pool) {
  forChunks(bytes, pool, [&](size_t at, size_t n) { file.read(static_cast<char*>(target) + at, n, offset + at); });
}

void readIntoPages(const InputFile& file, const PageFile& pages, uint64_t pageOffset, size_t bytes, uint64_t offset) {
  const std::unique_ptr<char[]> chunk(new char[std::min(bytes, kChunk)]);
  for (size_t done = 0; done < bytes; done += kChunk) {
    const size_t n = std::min(bytes - done, kChunk);
    file.read(chunk.get(), n, offset + done);
    pages.write(chunk.get(), n, pageOffset + done);
  }
}

void readFiniteParallel(const InputFile& file, void* target, size_t bytes, uint64_t offset, DType dtype,
                        ThreadPool& pool, size_t elementsBefore) {
  if (!isFloat(dtype)) return readParallel(file, target, bytes, offset, pool);
  const size_t size = sizeOf(dtype);
  forChunks(bytes, pool, [&](size_t at, size_t n) {
    char* data = static_cast<char*>(target) + at;
    file.read(data, n, offset + at);
    const size_t count = n / size;
    const size_t found = dtype == DType::f32
                             ? firstNotFinite<uint32_t>(data, count, 0x7f800000u)
                             : firstNotFinite<uint16_t>(data, count, dtype == DType::bf16 ? 0x7f80 : 0x7c00);
    if (found < count) {
      throw Error("ERR_QLORA_NON_FINITE",
                  file.path() + ": element " + std::to_string(elementsBefore + at / size + found) + " is infinite or NaN",
                  "The weights are damaged, or were stored in a type too small for them: get another copy.");
    }
  });
}

void readIntoDevice(const InputFile& file, DeviceQueue& queue, void* target, size_t bytes, uint64_t offset,
                    const DType* dtype, ThreadPool& pool) {
  constexpr size_t kPiece = 8 * kChunk;
  const std::unique_ptr<char[]> piece(new char[std::min(bytes, kPiece)]);
  for (size_t done = 0; done < bytes; done += kPiece) {
    const size_t n = std::min(bytes - done, kPiece);
    if (dtype) {
      readFiniteParallel(file, piece.get(), n, offset + done, *dtype, pool, done / sizeOf(*dtype));
    } else {
      readParallel(file, piece.get(), n, offset + done, pool);
    }
    queue.write(static_cast<char*>(target) + done, piece.get(), n);
  }
}

void writeFile(const std::string& path, const std::string& temporary, const std::vector<FilePart>& parts) {
  uint64_t wanted = 0;
  for (const FilePart& part : parts) wanted += part.bytes;
  OutputFile file(path, temporary, wanted);
  for (const FilePart& part : parts) file.write(part);
  file.commit();
}

}  // namespace qlora
