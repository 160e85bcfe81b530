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

/// Null where there is none.
void* openDriver() { return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); }

/// The CUDA version that the driver is for. Throws where there is none.
int driverVersion() {
  void* driver = openDriver();
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

namespace {

struct Devices {
  std::mutex mutex;
  std::map<int, std::shared_ptr<Device>> opened;
};

// Never taken down: streams may outlive whatever would be the right moment at the end of a process.
Devices& devices() {
  static auto& all = *new Devices;
  return all;
}

}  // namespace

bool hasCudaDriver() { return openDriver() != nullptr; }

std::shared_ptr<Device> cudaDevice(int index) {
  const CudaPlugin& plugin = cudaPlugin();
  Devices& all = devices();
  std::lock_guard lock(all.mutex);
  if (const auto found = all.opened.find(index); found != all.opened.end()) return found->second;
  const int count = plugin.deviceCount();
  if (count == 0) {
    refuse("the NVIDIA driver finds no device", std::string("See `nvidia-smi` and CUDA_VISIBLE_DEVICES. ") + kUseCpu);
  }
  if (index < 0 || index >= count) {
    refuse("there is no device cuda:" + std::to_string(index) + ": this machine has " + std::to_string(count),
           "Devices are counted from 0.");
  }
  return all.opened[index] = plugin.openDevice(index);
}

std::vector<std::shared_ptr<Device>> openedCudaDevices() {
  Devices& all = devices();
  std::lock_guard lock(all.mutex);
  std::vector<std::shared_ptr<Device>> list;
  for (const auto& [index, device] : all.opened) list.push_back(device);
  return list;
}

}  // namespace qlora
