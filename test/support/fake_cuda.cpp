// A driver and a plugin that say what the environment tells them to, for the test of what the addon says of these.
// Compiled with FAKE_DRIVER as libcuda.so.1, without as libqlora_cuda.so.
#include <cstdio>
#include <cstdlib>

#include "ops/cuda_select.h"
#include "plugin_build.h"

namespace {

int number(const char* name) { return std::atoi(std::getenv(name)); }

}  // namespace

#ifdef FAKE_DRIVER

/// Leaves a trace, so that a test sees whether it was opened.
__attribute__((constructor)) static void opened() {
  if (std::FILE* file = std::fopen(std::getenv("FAKE_TRACE"), "w")) std::fclose(file);
}

extern "C" int cuDriverGetVersion(int* version) {
  *version = number("FAKE_DRIVER_VERSION");
  return 0;
}

#else

extern "C" const qlora::CudaPlugin* qlora_cuda_plugin() {
  static const qlora::OpTable noOperations{};
  static const qlora::CudaPlugin plugin = {
      number("FAKE_SAME_BUILD") ? QLORA_PLUGIN_BUILD : "another",
      13000,
      &noOperations,
      [] { return number("FAKE_DEVICES"); },
      [](int) -> std::unique_ptr<qlora::Device> { throw qlora::Error("ERR_QLORA_DEVICE", "not a device"); },
  };
  return &plugin;
}

#endif
