// Preloaded into a process to disturb what it does to files whose path contains FAIL_UNDER, those that were unlinked
// meanwhile included. Every open, mkdir, read, write, reserve (posix_fallocate), fsync, close, rename, unlink and rmdir
// of theirs is counted, from 0, anew whenever FAIL_AT changes; with FAIL_CALL=name only those of that name.
//   FAIL_AT=n FAIL_WITH=errno: that call fails;  =kill: the process is killed there.
//   FAIL_AT=n FAIL_WITH=short: a read or write does half;  =end: it does nothing.
//   FAIL_LOG=file: calls are written down, one a line, that one a second time after 'disturbed'.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace {

std::mutex mutex;
int counted = 0;
std::string failAt;

template <class Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

const char* env(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

bool isUnder(const char* path) { return *env("FAIL_UNDER") && std::strstr(path, env("FAIL_UNDER")); }

// Of a descriptor that counts; empty for others.
std::string pathOf(int descriptor) {
  char path[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t n = readlink(link.c_str(), path, sizeof path - 1);
  path[n > 0 ? n : 0] = 0;
  return isUnder(path) ? path : "";
}

void log(const std::string& line) {
  if (!*env("FAIL_LOG")) return;
  static const int file = static_cast<int>(
      syscall(SYS_openat, AT_FDCWD, env("FAIL_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
  if (syscall(SYS_write, file, (line + "\n").data(), line.size() + 1) < 0) std::abort();
}

// Counts a call, and says whether it is the one to be disturbed.
bool hit(const char* name, const std::string& what) {
  if (*env("FAIL_CALL") && std::strcmp(env("FAIL_CALL"), name) != 0) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  log(name + (" " + what));
  if (failAt != env("FAIL_AT")) {
    failAt = env("FAIL_AT");
    counted = 0;
  }
  if (failAt.empty() || counted++ != std::atoi(failAt.c_str())) return false;
  log("disturbed " + (name + (" " + what)));
  if (std::strcmp(env("FAIL_WITH"), "kill") == 0) kill(getpid(), SIGKILL);
  return true;
}

// 0 where a call is to go on.
int errorOf(const char* name, const std::string& what) { return hit(name, what) ? std::atoi(env("FAIL_WITH")) : 0; }

bool fails(const char* name, const std::string& what) {
  const int error = errorOf(name, what);
  if (error) errno = error;
  return error;
}

int openAny(const char* name, const char* path, int flags, int mode) {
  const auto call = real<int (*)(const char*, int, ...)>(name);
  return isUnder(path) && fails("open", path) ? -1 : call(path, flags, mode);
}

// `transfer`, which takes a number of bytes, with as many of them as it may do.
template <class Transfer>
ssize_t limited(const char* name, int descriptor, size_t bytes, Transfer transfer) {
  const std::string path = pathOf(descriptor);
  if (path.empty() || !hit(name, path)) return transfer(bytes);
  if (std::strcmp(env("FAIL_WITH"), "short") == 0) return transfer((bytes + 1) / 2);
  if (std::strcmp(env("FAIL_WITH"), "end") == 0) return 0;
  errno = std::atoi(env("FAIL_WITH"));
  return -1;
}

}  // namespace

extern "C" {

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
  return limited("write", descriptor, bytes, [&](size_t n) { return call(descriptor, data, n); });
}

ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  const auto call = real<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite");
  return limited("write", descriptor, bytes, [&](size_t n) { return call(descriptor, data, n, offset); });
}

ssize_t read(int descriptor, void* data, size_t bytes) {
  const auto call = real<ssize_t (*)(int, void*, size_t)>("read");
  return limited("read", descriptor, bytes, [&](size_t n) { return call(descriptor, data, n); });
}

ssize_t pread(int descriptor, void* data, size_t bytes, off_t offset) {
  const auto call = real<ssize_t (*)(int, void*, size_t, off_t)>("pread");
  return limited("read", descriptor, bytes, [&](size_t n) { return call(descriptor, data, n, offset); });
}

ssize_t pwrite64(int descriptor, const void* data, size_t bytes, off64_t offset) {
  return pwrite(descriptor, data, bytes, offset);
}

ssize_t pread64(int descriptor, void* data, size_t bytes, off64_t offset) {
  return pread(descriptor, data, bytes, offset);
}

int posix_fallocate(int descriptor, off_t offset, off_t bytes) {
  const std::string path = pathOf(descriptor);
  if (const int error = path.empty() ? 0 : errorOf("reserve", path)) return error;
  return real<int (*)(int, off_t, off_t)>("posix_fallocate")(descriptor, offset, bytes);
}

int fsync(int descriptor) {
  const std::string path = pathOf(descriptor);
  return !path.empty() && fails("fsync", path) ? -1 : real<int (*)(int)>("fsync")(descriptor);
}

int close(int descriptor) {
  const std::string path = pathOf(descriptor);
  const bool failing = !path.empty() && fails("close", path);
  const int error = errno;
  const int result = real<int (*)(int)>("close")(descriptor);
  if (!failing) return result;
  errno = error;
  return -1;
}

int rename(const char* from, const char* to) {
  if (isUnder(to) && fails("rename", std::string(from) + " " + to)) return -1;
  return real<int (*)(const char*, const char*)>("rename")(from, to);
}

int mkdir(const char* path, mode_t mode) {
  if (isUnder(path) && fails("mkdir", path)) return -1;
  return real<int (*)(const char*, mode_t)>("mkdir")(path, mode);
}

int unlink(const char* path) {
  if (isUnder(path) && fails("unlink", path)) return -1;
  return real<int (*)(const char*)>("unlink")(path);
}

int rmdir(const char* path) {
  if (isUnder(path) && fails("rmdir", path)) return -1;
  return real<int (*)(const char*)>("rmdir")(path);
}

}  // extern "C"
