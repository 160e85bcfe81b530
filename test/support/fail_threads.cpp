// LD_PRELOAD: of the threads that the addon starts, the third and later ones up to the seventh are refused.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include <atomic>

using Start = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*routine)(void*), void* argument) {
  static const auto real = reinterpret_cast<Start>(dlsym(RTLD_NEXT, "pthread_create"));
  static std::atomic<int> started{0};
  Dl_info caller;
  const bool ours = dladdr(__builtin_return_address(0), &caller) && caller.dli_fname && strstr(caller.dli_fname, "stdc++");
  // The seven workers of the pool come first, then the stream.
  if (ours && started++ >= 2 && started <= 3) return EAGAIN;
  return real(thread, attributes, routine, argument);
}
