// Launching kernels, and what the compilers for GPUs and for the host call differently.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "core/stream.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define QLORA_DEVICE __device__ __forceinline__
/// For index maps, tables and the like, which tests call on the host.
#define QLORA_HOST_DEVICE __host__ __device__ __forceinline__
/// An array of the block.
#define QLORA_SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
/// Before a parameter of a kernel: it is read where it was put, also by an index that is not constant.
#define QLORA_GRID_CONSTANT const __grid_constant__

#else

#include "cuda/emulated/api.h"
#include "cuda/emulated/engine.h"

#define QLORA_DEVICE inline
#define QLORA_HOST_DEVICE inline
#define QLORA_GRID_CONSTANT const
#define QLORA_SHARED_ARRAY(type, name, count) \
  static const char name##Declaration = 0;    \
  type* const name = static_cast<type*>(::qlora::emulated::sharedArray(&name##Declaration, sizeof(type) * (count)))

#endif

namespace qlora {

inline void checkCuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail("ERR_QLORA_DEVICE", "CUDA: %s failed: %s", what, cudaGetErrorString(error));
}

/// A queue of the plugin.
class CudaQueue : public DeviceQueue {
 public:
  /// Where launches and copies go. Throws where the stream's thread could not choose the device.
  cudaStream_t stream() const {
    checkCuda(begun_, "choosing the device");
    return stream_;
  }

 protected:
  cudaStream_t stream_ = nullptr;
  cudaError_t begun_ = cudaSuccess;
};

/// 10 times the major number and the minor.
inline int capabilityOf(const Context& context) { return 10 * context.device->major + context.device->minor; }

/// Whether a device runs code that was compiled for just it, and not what its driver makes of code for an older one.
inline bool hasNativeCode([[maybe_unused]] int capability) {
#if defined(__CUDACC__)
  for (const int compiled : {__CUDA_ARCH_LIST__}) {
    if (compiled == 10 * capability) return true;
  }
  return false;
#else
  return true;
#endif
}

/// Whether kernels have wgmma and tensor maps: of 9.0 alone, which is always compiled as 9.0a (plugin.cmake).
inline bool hasWgmma(const Context& context) { return capabilityOf(context) == 90 && hasNativeCode(90); }

inline cudaStream_t streamOf(const Context& context) { return static_cast<CudaQueue&>(*context.queue).stream(); }

/// Blocks of a launch, which knows where it stands.
struct Grid : dim3 {
  Grid(dim3 blocks, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : dim3(blocks), file(file), line(line) {}
  Grid(int64_t blocks, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : dim3(static_cast<unsigned>(blocks)), file(file), line(line) {}

  /// As rms_norm.cu:40.
  std::string where() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }

  const char* file;
  int line;
};

inline void checkLaunch(cudaError_t error, const Grid& grid) {
  if (error != cudaSuccess) checkCuda(error, grid.where().c_str());
}

/// When a kernel may begin.
enum class Start {
  in_order,  // once what was enqueued before it has ended
  early,     // while that is ending: the kernel calls waitForEarlier()
};

namespace detail {

#if defined(__CUDACC__)
inline void enqueue(const Context& context, Start start, const void* kernel, const Grid& grid, dim3 block,
                    size_t sharedBytes, void** arguments) {
  // More than every GPU has must be asked for.
  if (sharedBytes > (48 << 10)) {
    checkCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes)),
              "asking for shared memory");
  }
  cudaLaunchConfig_t config{.gridDim = grid,
                            .blockDim = block,
                            .dynamicSmemBytes = sharedBytes,
                            .stream = streamOf(context),
                            .attrs = nullptr,
                            .numAttrs = 0};
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const int capability = capabilityOf(context);
  // Code for an older device does not wait for the kernel before.
  if (start == Start::early && capability >= 90 && hasNativeCode(capability)) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  checkLaunch(cudaLaunchKernelExC(&config, kernel, arguments), grid);
}
#endif

template <class... Parameters, class... Arguments>
void launchAt(const Context& context, Start start, void (*kernel)(Parameters...), const Grid& grid, dim3 block,
              size_t sharedBytes, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "a kernel is given as many arguments as it takes");
  if (!context.queue || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  ++context.queue->kernels;
  std::tuple<Parameters...> values(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
#if defined(__CUDACC__)
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value..., nullptr};
        enqueue(context, start, reinterpret_cast<const void*>(kernel), grid, block, sharedBytes, pointers);
      },
      values);
#else
  static_cast<void>(start);
  const cudaStream_t stream = streamOf(context);
  checkLaunch(emulated::answer("cudaLaunchKernel"), grid);
  const size_t maxShared = emulated::maxSharedOf(capabilityOf(context));
  emulated::submit(stream, [=] {
    emulated::run(grid.where(), grid, block, sharedBytes, maxShared, [&] { std::apply(kernel, values); });
  });
#endif
}

}  // namespace detail

/// Enqueues kernel(arguments...) on grid x block threads. Nothing in a rehearsal or where the grid is empty.
template <class... Parameters, class... Arguments>
void launch(const Context& context, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t sharedBytes,
            Arguments&&... arguments) {
  detail::launchAt(context, Start::in_order, kernel, grid, block, sharedBytes, std::forward<Arguments>(arguments)...);
}

/// The same of a kernel that may begin early, by which its start hides behind the end of the one before it: every
/// thread calls waitForEarlier() before it reads what another kernel may have written, or writes.
template <class... Parameters, class... Arguments>
void launchEarly(const Context& context, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t sharedBytes,
                 Arguments&&... arguments) {
  detail::launchAt(context, Start::early, kernel, grid, block, sharedBytes, std::forward<Arguments>(arguments)...);
}

/// Waits, in a kernel of launchEarly(), for what was enqueued before it to have ended.
QLORA_DEVICE void waitForEarlier() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// From here on the next kernel may begin, if it is one of launchEarly(): once all blocks have come here or ended.
QLORA_DEVICE void letNextBegin() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// The first thing in a kernel of launchEarly() that has nothing to do until what was enqueued before it has ended.
QLORA_DEVICE void beginEarly() {
  letNextBegin();
  waitForEarlier();
}

/// Sets bytes on the device.
inline void setBytes(const Context& context, void* to, int value, size_t bytes) {
  if (context.queue && bytes) checkCuda(cudaMemsetAsync(to, value, bytes, streamOf(context)), "a fill");
}

/// Copies within the device.
inline void copyBytes(const Context& context, void* to, const void* from, size_t bytes) {
  if (!context.queue || !bytes) return;
  checkCuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, streamOf(context)), "a copy");
}

}  // namespace qlora
