// Preloaded into a process to make the n-th system call of a save fail. A save begins where a temporary file is
// created; from there on every open, write, fsync, close and rename of that thread is counted, from 0.
//   FAIL_AT=n FAIL_WITH=errno: that call fails;  FAIL_WITH=short: that write writes half.
// Files that have no name, which hold paged state, are counted by themselves, over all threads:
//   FAIL_PAGING=pread, pwrite or posix_fallocate FAIL_PAGING_AT=n FAIL_WITH=errno, short or end: that call of these.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace {

thread_local int next = -1;  // -1: no save under way
thread_local bool renamed = false;

template <class Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

// Whether this call is the one to fail. After it nothing is counted, so that the rest of the process is left alone.
bool hit() {
  const char* at = std::getenv("FAIL_AT");
  if (!at || next < 0 || next++ != std::atoi(at)) return false;
  next = -1;
  return true;
}

bool isShort() { return std::strcmp(std::getenv("FAIL_WITH"), "short") == 0; }

bool fails() {
  if (!hit() || isShort()) return false;
  errno = std::atoi(std::getenv("FAIL_WITH"));
  return true;
}

int openAny(const char* name, const char* path, int flags, int mode) {
  static thread_local bool again = false;  // an interrupted open is repeated
  if (std::strstr(path, ".qlora-tmp") && !std::exchange(again, false)) {
    next = 0;
    renamed = false;
  }
  if (fails()) {
    again = errno == EINTR && next < 0 && (flags & O_CREAT);
    return -1;
  }
  return real<int (*)(const char*, int, ...)>(name)(path, flags, mode);
}

std::atomic<int> paged{0};

bool hitPaging(const char* call, int descriptor) {
  const char* wanted = std::getenv("FAIL_PAGING");
  struct stat status;
  if (!wanted || std::strcmp(wanted, call) != 0 || fstat(descriptor, &status) != 0 || status.st_nlink != 0)
    return false;
  return paged++ == std::atoi(std::getenv("FAIL_PAGING_AT"));
}

/// What a transfer that is to fail does instead: half of it, nothing, or an error.
template <class Data>
ssize_t failTransfer(const char* call, int descriptor, Data data, size_t bytes, off_t offset) {
  if (isShort()) return real<ssize_t (*)(int, Data, size_t, off_t)>(call)(descriptor, data, (bytes + 1) / 2, offset);
  if (std::strcmp(std::getenv("FAIL_WITH"), "end") == 0) return 0;
  errno = std::atoi(std::getenv("FAIL_WITH"));
  return -1;
}

}  // namespace

extern "C" {

ssize_t pread(int descriptor, void* data, size_t bytes, off_t offset) {
  if (hitPaging("pread", descriptor)) return failTransfer("pread", descriptor, data, bytes, offset);
  return real<ssize_t (*)(int, void*, size_t, off_t)>("pread")(descriptor, data, bytes, offset);
}

ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  if (hitPaging("pwrite", descriptor)) return failTransfer("pwrite", descriptor, data, bytes, offset);
  return real<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite")(descriptor, data, bytes, offset);
}

int posix_fallocate(int descriptor, off_t offset, off_t bytes) {
  if (hitPaging("posix_fallocate", descriptor)) return std::atoi(std::getenv("FAIL_WITH"));
  return real<int (*)(int, off_t, off_t)>("posix_fallocate")(descriptor, offset, bytes);
}

int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
  va_end(rest);
  return openAny("open", path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
  va_end(rest);
  return openAny("open64", path, flags, mode);
}

ssize_t write(int descriptor, const void* data, size_t bytes) {
  const auto call = real<ssize_t (*)(int, const void*, size_t)>("write");
  if (!hit()) return call(descriptor, data, bytes);
  if (isShort()) return call(descriptor, data, (bytes + 1) / 2);
  errno = std::atoi(std::getenv("FAIL_WITH"));
  return -1;
}

int fsync(int descriptor) { return fails() ? -1 : real<int (*)(int)>("fsync")(descriptor); }

int close(int descriptor) {
  const bool failing = fails();
  const int error = errno;
  const int result = real<int (*)(int)>("close")(descriptor);
  if (renamed) next = -1;  // the folder's: the save is over
  if (!failing) return result;
  errno = error;
  return -1;
}

int rename(const char* from, const char* to) {
  if (fails()) return -1;
  renamed = next >= 0;
  return real<int (*)(const char*, const char*)>("rename")(from, to);
}

}  // extern "C"
