// CUDA's plugin, as the addon sees it: libqlora_cuda.so beside the addon, opened when a CUDA device is asked for and a
// driver is there. It exports one C function of this name and type.
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"
#include "ops/op_table.h"

namespace qlora {

/// What the plugin offers. Addon and plugin share C++ types, so both must be of one build: `build` is made from the
/// headers of both (QLORA_PLUGIN_BUILD).
struct CudaPlugin {
  const char* build;
  /// 1000 x major + 10 x minor of the CUDA runtime in it: the driver must be for at least this major version.
  int runtimeVersion;
  const OpTable* ops;
  /// How many devices there are. Throws ERR_QLORA_DEVICE where the runtime cannot tell.
  int (*deviceCount)();
  /// Throws ERR_QLORA_DEVICE where its compute capability is too low.
  std::unique_ptr<Device> (*openDevice)(int index);
};
using CudaPluginFunction = const CudaPlugin*();
constexpr const char* kCudaPluginFunction = "qlora_cuda_plugin";

/// The plugin; throws ERR_QLORA_DEVICE, with the remedy, where there is no driver, it is too old, or the plugin is
/// missing or of another build. QLORA_CUDA=emulated takes the plugin that computes on the CPU, which needs no driver.
const CudaPlugin& cudaPlugin();
/// Whether a driver is here, of whatever version.
bool hasCudaDriver();
/// Device `index` of it, opened once a process.
std::shared_ptr<Device> cudaDevice(int index);
/// Those that were opened so far.
std::vector<std::shared_ptr<Device>> openedCudaDevices();

}  // namespace qlora
