#include "core/page_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "core/operation.h"
#include "core/system_call.h"

namespace qlora {

namespace {

constexpr const char* kHint =
    "Check the disk that the optimizer's state is paged to, then resume from the last checkpoint.";

[[noreturn]] void failed(const char* code, const std::string& path, const std::string& what, const char* hint) {
  throw Error(code, path + ": cannot " + what, hint);
}

/// 0, or the error's number.
int reserve(int descriptor, uint64_t bytes) {
#ifdef __APPLE__
  fstore_t wanted = {F_ALLOCATEALL, F_PEOFPOSMODE, 0, static_cast<off_t>(bytes), 0};
  if (retry([&] { return fcntl(descriptor, F_PREALLOCATE, &wanted); }) < 0) return errno;
  return retry([&] { return ftruncate(descriptor, static_cast<off_t>(bytes)); }) < 0 ? errno : 0;
#else
  if (bytes == 0) return 0;
  int error = EINTR;
  while (error == EINTR) error = posix_fallocate(descriptor, 0, static_cast<off_t>(bytes));
  return error;
#endif
}

/// Slots of a device's state are the host's and count there, also in a rehearsal.
std::shared_ptr<Memory> hostMemory(std::shared_ptr<Memory> memory) {
  if (memory->place() == MemoryPlace::host) return memory;
  const bool rehearsal = memory->backing() == Backing::addresses;
  return std::make_shared<Memory>(rehearsal ? Backing::addresses : Backing::pages);
}

}  // namespace

PageFile::PageFile(std::string path, uint64_t bytes, size_t slotBytes, std::shared_ptr<Memory> memory)
    : path_(std::move(path)),
      bytes_(bytes),
      slotBytes_(slotBytes),
      memory_(hostMemory(std::move(memory))) {
  // A rehearsal takes the memory and leaves the disk alone.
  if (memory_->backing() == Backing::addresses) {
    slots_ = static_cast<char*>(memory_->allocate(kPageSlots * slotBytes_, MemoryClass::optimizer));
    return;
  }
  const char* hint = "Give outputDir a folder on a disk that can be written, with space for the optimizer's state.";
  descriptor_ = retry([&] { return open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600); });
  if (descriptor_ < 0)
    failed("ERR_QLORA_WRITE_FAILED", path_, "create the file of paged state: " + describe(errno), hint);
  unlink(path_.c_str());
  if (const int error = reserve(descriptor_, bytes_)) {
    close(descriptor_);
    failed(isDiskFull(error) ? "ERR_QLORA_DISK_FULL" : "ERR_QLORA_WRITE_FAILED", path_,
           "reserve " + std::to_string(bytes_) + " bytes for paged optimizer state: " + describe(error), hint);
  }
  try {
    slots_ = static_cast<char*>(memory_->allocate(kPageSlots * slotBytes_, MemoryClass::optimizer));
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

PageFile::~PageFile() {
  if (descriptor_ >= 0) close(descriptor_);
  memory_->release(slots_, kPageSlots * slotBytes_, MemoryClass::optimizer);
}

uint64_t PageFile::take(uint64_t bytes) {
  const uint64_t begin = taken_, rounded = (bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
  if (rounded > bytes_ - begin) fail("ERR_QLORA_INTERNAL", "%s: more state is paged than was reserved", path_.c_str());
  taken_ += rounded;
  return begin;
}

void PageFile::read(void* target, size_t bytes, uint64_t offset) const {
  if (descriptor_ < 0) return;
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = retry([&] {
      return pread(descriptor_, static_cast<char*>(target) + done, bytes - done, static_cast<off_t>(offset + done));
    });
    if (n <= 0) {
      const std::string why = n < 0 ? describe(errno) : "it ends before its size";
      failed("ERR_QLORA_READ_FAILED", path_, "read paged optimizer state: " + why, kHint);
    }
    done += static_cast<size_t>(n);
  }
}

void PageFile::write(const void* source, size_t bytes, uint64_t offset) const {
  if (descriptor_ < 0) return;
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = retry([&] {
      return pwrite(descriptor_, static_cast<const char*>(source) + done, bytes - done,
                    static_cast<off_t>(offset + done));
    });
    if (n <= 0) {
      const int error = n < 0 ? errno : EIO;
      failed(isDiskFull(error) ? "ERR_QLORA_DISK_FULL" : "ERR_QLORA_WRITE_FAILED", path_,
             "write paged optimizer state: " + describe(error), kHint);
    }
    done += static_cast<size_t>(n);
  }
}

namespace {

/// Bytes in the file, and where in a slot they go.
struct Transfer {
  uint64_t offset;
  size_t bytes, at;
};

struct Batch {
  std::vector<PagedRun> runs;
  std::vector<Transfer> transfers;
};

size_t aligned(int64_t bytes) {
  return (static_cast<size_t>(bytes) + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
}

/// Bytes that `count` elements of all arrays take in a slot.
size_t slotBytesOf(const PagedArray* arrays, int arrayCount, int64_t count) {
  size_t bytes = 0;
  for (int a = 0; a < arrayCount; ++a) {
    bytes += aligned((count + arrays[a].elements - 1) / arrays[a].elements * arrays[a].itemBytes);
  }
  return bytes;
}

/// By sizes alone.
std::vector<Batch> cutIntoBatches(size_t slotBytes, const std::vector<Tensor>& params, const PagedArray* arrays,
                                  int arrayCount, int64_t piece) {
  if (slotBytesOf(arrays, arrayCount, piece) > slotBytes) {
    fail("ERR_QLORA_INTERNAL", "a slot of %zu bytes is too small for paged optimizer state", slotBytes);
  }
  std::vector<Batch> batches;
  size_t used = slotBytes;  // so that the first run opens a batch
  for (size_t t = 0; t < params.size(); ++t) {
    const int64_t size = params[t].size();
    for (int64_t begin = 0; begin < size;) {
      int64_t count = std::min(piece, size - begin);
      if (used + slotBytesOf(arrays, arrayCount, count) > slotBytes) {
        batches.emplace_back();
        used = 0;
      }
      while (begin + count < size) {
        const int64_t more = std::min(count + piece, size - begin);
        if (used + slotBytesOf(arrays, arrayCount, more) > slotBytes) break;
        count = more;
      }
      Batch& batch = batches.back();
      PagedRun run{static_cast<int64_t>(t), begin, count, {}};
      for (int a = 0; a < arrayCount; ++a) {
        const int64_t first = begin / arrays[a].elements;
        const int64_t items = (count + arrays[a].elements - 1) / arrays[a].elements;
        const auto bytes = static_cast<size_t>(items * arrays[a].itemBytes);
        const uint64_t offset =
            (*arrays[a].list)[t].storage->pageOffset + static_cast<uint64_t>(first * arrays[a].itemBytes);
        batch.transfers.push_back({offset, bytes, used});
        run.at[a] = used;
        used += aligned(static_cast<int64_t>(bytes));
      }
      batch.runs.push_back(run);
      begin += count;
    }
  }
  return batches;
}

/// Reads batches ahead and writes them back once they are updated, in a fixed order: batch k + 3 is read into the slot
/// of batch k after that was written.
class Pager {
 public:
  Pager(const PageFile& file, const std::vector<Batch>& batches) : file_(file), batches_(batches) {
    try {
      thread_ = std::thread([this] { work(); });
    } catch (const std::system_error&) {
      throw Error("ERR_QLORA_OUT_OF_MEMORY", "the thread that pages optimizer state cannot be started",
                  "The system's limit of threads or of memory is reached.");
    }
  }
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;
  ~Pager() {
    {
      std::lock_guard lock(mutex_);
      abandoned_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

  void waitForRead(size_t batch) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return read_ > batch || error_; });
    if (error_) std::rethrow_exception(error_);
  }
  void updated(size_t batch) {
    {
      std::lock_guard lock(mutex_);
      updated_ = batch + 1;
    }
    changed_.notify_all();
  }
  /// Until everything is written.
  void finish() {
    thread_.join();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    yieldToEventLoop();
    try {
      const size_t count = batches_.size();
      for (size_t k = 0; k < std::min<size_t>(kPageSlots, count); ++k) readIn(k);
      for (size_t k = 0; k < count; ++k) {
        {
          std::unique_lock lock(mutex_);
          changed_.wait(lock, [&] { return updated_ > k || abandoned_; });
          if (updated_ <= k) return;
        }
        for (const Transfer& t : batches_[k].transfers) file_.write(slotOf(k) + t.at, t.bytes, t.offset);
        if (k + kPageSlots < count) readIn(k + kPageSlots);
      }
    } catch (...) {
      std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    changed_.notify_all();
  }
  void readIn(size_t k) {
    for (const Transfer& t : batches_[k].transfers) file_.read(slotOf(k) + t.at, t.bytes, t.offset);
    {
      std::lock_guard lock(mutex_);
      read_ = k + 1;
    }
    changed_.notify_all();
  }
  char* slotOf(size_t k) const { return file_.slot(static_cast<int64_t>(k % kPageSlots)); }

  const PageFile& file_;
  const std::vector<Batch>& batches_;
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t read_ = 0, updated_ = 0;  // batches
  bool abandoned_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace

void streamPages(PageFile& file, const std::vector<Tensor>& params, const PagedArray* arrays, int arrayCount,
                 int64_t piece, void (*update)(void* body, char* slot, const PagedRun* runs, int64_t count),
                 void* body) {
  const std::vector<Batch> batches = cutIntoBatches(file.slotBytes(), params, arrays, arrayCount, piece);
  size_t done = 0;
  try {
    Pager pager(file, batches);
    for (; done < batches.size(); ++done) {
      const std::vector<PagedRun>& runs = batches[done].runs;
      pager.waitForRead(done);
      update(body, file.slot(static_cast<int64_t>(done % kPageSlots)), runs.data(), static_cast<int64_t>(runs.size()));
      pager.updated(done);
    }
    pager.finish();
  } catch (...) {
    if (done > 0) {
      const std::shared_ptr<const Error> error = currentError();
      for (size_t t = 0; t < params.size(); ++t) {
        params[t].storage->error = error;
        for (int a = 0; a < arrayCount; ++a) (*arrays[a].list)[t].storage->error = error;
      }
    }
    throw;
  }
}

void PageFile::stream(const std::vector<Tensor>& params, const PagedArray* arrays, int arrayCount, int64_t piece,
                      Update update, void* body) {
  streamPages(*this, params, arrays, arrayCount, piece, update, body);
}

}  // namespace qlora
