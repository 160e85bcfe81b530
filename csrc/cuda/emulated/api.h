// The part of CUDA's runtime API that the plugin uses, on pretended devices of the host's memory. Streams run kernels
// at once. A copy between host and device arrives when somebody waits for it and not before: a kernel behind it, an
// event or a stream that is waited for. Until then what it is to fill is NaN, so that a missing wait shows. And a
// stream that has copies alone, beside another, copies NaN where it did not wait for all that the other was given
// before. Outside of kernels and copies the device's memory cannot be touched, so that a launcher that reads it on the
// host crashes here as it would with a GPU. What tests want the devices to be like is in the environment:
//   QLORA_CUDA_MEMORY        bytes of them all
//   QLORA_CUDA_CAPABILITY    compute capability x 10 of each, as 70,90: which kernels are taken, and how much shared
//                            memory a block may have; instructions are those of 9.0
//   QLORA_CUDA_MULTIPROCESSORS   of each
//   QLORA_CUDA_FAIL          as cudaMemcpyAsync:3, the call that fails, and after which all others fail, as after an
//                            illegal access
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorIllegalAddress = 700 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
/// What a stream was given while it was captured.
using EmulatedGraph = std::vector<std::function<void()>>;
using cudaGraph_t = EmulatedGraph*;
using cudaGraphExec_t = EmulatedGraph*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0;
constexpr int CUDART_VERSION = 13000;

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace qlora::emulated {

/// What a call of that name answers: success, or what QLORA_CUDA_FAIL wants.
cudaError_t answer(const char* name);

/// Does what a stream is given, after the copies before it: now, or when the graph is launched that this thread
/// captures.
void submit(cudaStream_t stream, std::function<void()> work);

/// While one is alive, the device's memory can be touched.
class MemoryAccess {
 public:
  MemoryAccess();
  MemoryAccess(const MemoryAccess&) = delete;
  MemoryAccess& operator=(const MemoryAccess&) = delete;
  ~MemoryAccess();
};

}  // namespace qlora::emulated
