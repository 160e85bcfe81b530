#include "ops/cuda_select.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "core/error.h"
#include "plugin_build.h"

namespace qlora {

namespace {

constexpr const char* kUseCpu = "Use device: 'cpu' or 'auto'.";

[[noreturn]] void refuse(const std::string& message, const std::string& hint) {
  throw Error("ERR_QLORA_DEVICE", message, hint);
}

std::string versionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

/// The CUDA version that the driver is for. Throws where there is none.
int driverVersion() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    refuse("no NVIDIA driver is here: libcuda.so.1 was not found",
           std::string("Install the NVIDIA driver; the CUDA toolkit is not needed. ") + kUseCpu);
  }
  const auto get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  if (!get || get(&version) != 0) {
    refuse("the NVIDIA driver does not say its version", std::string("Install it again. ") + kUseCpu);
  }
  return version;
}

/// The folder of the addon, with a slash.
std::string addonFolder() {
  Dl_info here{};
  if (!dladdr(reinterpret_cast<const void*>(&cudaPlugin), &here) || !here.dli_fname) return "";
  const std::string path = here.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

const CudaPlugin& openPlugin(const char* name) {
  const std::string path = addonFolder() + name;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = dlerror();
    refuse("the CUDA plugin could not be opened: " + std::string(why ? why : path.c_str()),
           std::string("Build it with `npm run build:cuda`, which needs the CUDA toolkit. ") + kUseCpu);
  }
  const auto function = reinterpret_cast<CudaPluginFunction*>(dlsym(library, kCudaPluginFunction));
  const CudaPlugin* plugin = function ? function() : nullptr;
  if (!plugin || std::string(plugin->build) != QLORA_PLUGIN_BUILD) {
    refuse(path + " belongs to another build of the addon (" + (plugin ? plugin->build : "unknown") + ", not " +
               QLORA_PLUGIN_BUILD + ")",
           "Build both together: `npm run build:native && npm run build:cuda`.");
  }
  return *plugin;
}

const CudaPlugin& findPlugin() {
  const char* wanted = std::getenv("QLORA_CUDA");
  if (wanted && std::string(wanted) == "emulated") return openPlugin("libqlora_cuda_emulated.so");
  const int driver = driverVersion();
  const CudaPlugin& plugin = openPlugin("libqlora_cuda.so");
  // Within a major version, an older driver runs what a newer toolkit has made.
  if (driver / 1000 < plugin.runtimeVersion / 1000) {
    refuse("the NVIDIA driver is too old: it is for CUDA " + versionText(driver) + ", the plugin needs " +
               versionText(plugin.runtimeVersion / 1000 * 1000) + " or later",
           std::string("Update the NVIDIA driver. ") + kUseCpu);
  }
  return plugin;
}

}  // namespace

const CudaPlugin& cudaPlugin() {
  // Where it fails, it is tried again when next asked.
  static const CudaPlugin& plugin = findPlugin();
  return plugin;
}

std::shared_ptr<Device> cudaDevice(int index) {
  static std::mutex mutex;
  // Never taken down: streams may outlive whatever would be the right moment at the end of a process.
  static auto& devices = *new std::map<int, std::shared_ptr<Device>>;
  const CudaPlugin& plugin = cudaPlugin();
  std::lock_guard lock(mutex);
  std::shared_ptr<Device>& device = devices[index];
  if (device) return device;
  const int count = plugin.deviceCount();
  if (index < 0 || index >= count) {
    devices.erase(index);
    refuse(count == 0
               ? "the NVIDIA driver finds no device"
               : "there is no device cuda:" + std::to_string(index) + ": this machine has " + std::to_string(count),
           count == 0 ? std::string("See `nvidia-smi` and CUDA_VISIBLE_DEVICES. ") + kUseCpu
                      : "Devices are counted from 0.");
  }
  device = plugin.openDevice(index);
  return device;
}

}  // namespace qlora
