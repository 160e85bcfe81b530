// The plugin's one exported function, and its table of operations.
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "ops/cuda_select.h"
#include "plugin_build.h"

namespace qlora {

namespace cuda {

// An operation that no .cu file defines yet is null, and refused by name when it is called.
#define QLORA_OP_DECLARATION(function, Args) __attribute__((weak)) void function(Context&, const Args&);
QLORA_OPS(QLORA_OP_DECLARATION)
#undef QLORA_OP_DECLARATION

namespace {

const OpTable table = {
#if defined(__CUDACC__)
    "cuda",
#else
    "cuda-emulated",
#endif
#define QLORA_OP_ENTRY(function, Args) function,
    QLORA_OPS(QLORA_OP_ENTRY)
#undef QLORA_OP_ENTRY
};

}  // namespace
}  // namespace cuda

extern "C" __attribute__((visibility("default"))) const CudaPlugin* qlora_cuda_plugin() {
  static const CudaPlugin plugin = {QLORA_PLUGIN_BUILD, CUDART_VERSION, &cuda::table, cuda::deviceCount,
                                    cuda::openDevice};
  return &plugin;
}

}  // namespace qlora
