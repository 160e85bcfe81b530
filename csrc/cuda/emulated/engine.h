// Runs kernels on the CPU: a block's threads are fibers, which give way at barriers and warp operations. One block runs
// at a time, on the stream's thread. It reports what a GPU would hang at or corrupt memory with: a barrier that not
// every thread reaches, lanes of a warp at different operations, shared memory that does not fit, misaligned access.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "cuda/emulated/language.h"

namespace qlora::emulated {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStaticShared = 48 << 10;
constexpr size_t kMaxShared = 227 << 10;  // of compute capability 9.0, which has the most

/// Bytes of shared memory that a block may have, of a capability such as 75; what is not named has 99 KiB, as 8.6.
constexpr size_t maxSharedOf(int capability) {
  return capability == 90 ? kMaxShared : capability == 80 ? 163 << 10 : capability == 75 ? 64 << 10 : 99 << 10;
}
/// Bytes that a lane may give to the others of its warp at once.
constexpr size_t kPayload = 64;

/// What a thread of a kernel knows of itself.
struct Place {
  uint3 threadIdx, blockIdx;
  dim3 blockDim, gridDim;
};
/// Of the thread that runs. Of initial-exec, since kernels ask all the time.
extern __attribute__((tls_model("initial-exec"))) constinit thread_local const Place* place;

/// Runs body as each thread of each block, which has `maxShared` bytes of shared memory at most. Throws
/// ERR_QLORA_DEVICE, which begins with `kernel`, where something is wrong.
void run(const std::string& kernel, dim3 grid, dim3 block, size_t sharedBytes, size_t maxShared,
         const std::function<void()>& body);

void syncThreads();
/// Gives `bytes` of payload to the warp, and returns those of lane l at l x kPayload once all 32 have given. They stay
/// until this lane's next call. `what` is the operation, the same for all lanes.
const unsigned char* exchange(const char* what, const void* payload, size_t bytes);
int laneOfThread();

/// The block's array of that declaration, poisoned with NaN when the block begins.
void* sharedArray(const void* declaration, size_t bytes);
void* dynamicShared();

/// Ends the kernel with an error.
[[noreturn]] void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// Copies that a thread has begun and not waited for (cp.async): they arrive when it waits.
void beginCopy(void* to, const void* from, size_t bytes, size_t zeros);
void commitCopies();
void waitForCopies(int groupsLeft);

/// Until `holds`, other threads run; and what was to be done when `barrier` is waited for is done.
void waitUntil(const void* barrier, const std::function<bool()>& holds);
void whenWaited(const void* barrier, std::function<void()> copy);

}  // namespace qlora::emulated

#define threadIdx (::qlora::emulated::place->threadIdx)
#define blockIdx (::qlora::emulated::place->blockIdx)
#define blockDim (::qlora::emulated::place->blockDim)
#define gridDim (::qlora::emulated::place->gridDim)
