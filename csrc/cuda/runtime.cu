#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>

#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace qlora::cuda {

namespace {

constexpr int kLowestMajor = 7, kLowestMinor = 5;

/// Pinned memory that copies between device and host go through: while what one piece holds is on its way, the next is
/// filled or emptied. Small writes share a piece, so that they hardly ever wait for the device.
class Staging {
 public:
  static constexpr size_t kPiece = size_t{4} << 20;
  static constexpr int kPieces = 2;

  Staging() {
    for (Piece& piece : pieces_) {
      checkCuda(cudaHostAlloc(&piece.data, kPiece, cudaHostAllocDefault), "taking pinned memory");
      checkCuda(cudaEventCreateWithFlags(&piece.done, cudaEventDisableTiming), "making an event");
    }
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging() {
    for (Piece& piece : pieces_) {
      if (piece.done) cudaEventDestroy(piece.done);
      if (piece.data) cudaFreeHost(piece.data);
    }
  }

  void write(cudaStream_t stream, char* device, const char* host, size_t bytes) {
    for (size_t at = 0; at < bytes;) {
      if (used_ == kPiece) turn(stream);
      const size_t n = std::min(kPiece - used_, bytes - at);
      char* staged = static_cast<char*>(pieces_[current_].data) + used_;
      std::memcpy(staged, host + at, n);
      checkCuda(cudaMemcpyAsync(device + at, staged, n, cudaMemcpyHostToDevice, stream), "a copy to the device");
      at += n;
      used_ = std::min(kPiece, (used_ + n + kAlignment - 1) / kAlignment * kAlignment);
    }
  }

  void read(cudaStream_t stream, char* host, const char* device, size_t bytes) {
    const auto begin = [&](size_t at) {
      turn(stream);
      Piece& piece = pieces_[current_];
      checkCuda(cudaMemcpyAsync(piece.data, device + at, std::min(kPiece, bytes - at), cudaMemcpyDeviceToHost, stream),
                "a copy from the device");
      checkCuda(cudaEventRecord(piece.done, stream), "an event");
      return &piece;
    };
    Piece* piece = bytes ? begin(0) : nullptr;
    for (size_t at = 0; at < bytes; at += kPiece) {
      Piece* following = at + kPiece < bytes ? begin(at + kPiece) : nullptr;
      checkCuda(cudaEventSynchronize(piece->done), "waiting for the device");
      std::memcpy(host + at, piece->data, std::min(kPiece, bytes - at));
      piece = following;
    }
  }

 private:
  static constexpr size_t kAlignment = 64;

  struct Piece {
    void* data = nullptr;
    cudaEvent_t done = nullptr;
  };

  /// Leaves a piece for the next, once what that last held has arrived.
  void turn(cudaStream_t stream) {
    checkCuda(cudaEventRecord(pieces_[current_].done, stream), "an event");
    current_ = (current_ + 1) % kPieces;
    checkCuda(cudaEventSynchronize(pieces_[current_].done), "waiting for the device");
    used_ = 0;
  }

  Piece pieces_[kPieces];
  int current_ = 0;
  size_t used_ = 0;  // bytes of the current piece
};

class Graph : public DeviceGraph {
 public:
  Graph(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    checkCuda(cudaGraphInstantiate(&executable_, graph, 0), "making a graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() override { cudaGraphExecDestroy(executable_); }

  void launch() override { checkCuda(cudaGraphLaunch(executable_, stream_), "launching a graph"); }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

/// A copy by the stream of copies.
class Copy : public DeviceCopy {
 public:
  Copy() { checkCuda(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "making an event"); }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;
  ~Copy() override {
    if (!awaited_) cudaEventSynchronize(done_);
    cudaEventDestroy(done_);
  }

  void beginOn(cudaStream_t copies, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    checkCuda(cudaMemcpyAsync(to, from, bytes, kind, copies), "a copy beside the kernels");
    const cudaError_t error = cudaEventRecord(done_, copies);
    if (error != cudaSuccess) cudaStreamSynchronize(copies);  // nobody else could wait for it
    checkCuda(error, "an event");
  }
  void awaitOn(cudaStream_t stream) {
    checkCuda(cudaStreamWaitEvent(stream, done_, 0), "waiting for a copy");
    awaited_ = true;
  }

 private:
  cudaEvent_t done_ = nullptr;
  bool awaited_ = false;
};

/// The streams of a device's copies beside kernels. Whoever frees what they copy from or to waits for all of them, and
/// not for the device, which nobody may do while another stream's graph is captured: that would be the end of it.
class CopyStreams {
 public:
  void add(cudaStream_t stream) {
    std::lock_guard lock(mutex_);
    streams_.insert(stream);
  }
  void remove(cudaStream_t stream) {
    std::lock_guard lock(mutex_);
    streams_.erase(stream);
  }
  void wait() {
    std::lock_guard lock(mutex_);
    for (const cudaStream_t stream : streams_) cudaStreamSynchronize(stream);
  }

 private:
  std::mutex mutex_;
  std::set<cudaStream_t> streams_;
};

/// Copies beside a stream, in an order of their own.
class Copies {
 public:
  explicit Copies(CopyStreams& all) : all_(all) {
    checkCuda(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming), "making an event");
    const cudaError_t error = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    if (error != cudaSuccess) cudaEventDestroy(ready_);
    checkCuda(error, "making a stream");
    all_.add(stream_);
  }
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;
  ~Copies() {
    cudaStreamSynchronize(stream_);
    all_.remove(stream_);
    cudaEventDestroy(ready_);
    cudaStreamDestroy(stream_);
  }

  /// Begins when what `after` has been given so far has ended.
  std::unique_ptr<DeviceCopy> begin(cudaStream_t after, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    auto copy = std::make_unique<Copy>();
    checkCuda(cudaEventRecord(ready_, after), "an event");
    checkCuda(cudaStreamWaitEvent(stream_, ready_, 0), "waiting for a kernel");
    copy->beginOn(stream_, to, from, bytes, kind);
    return copy;
  }

 private:
  CopyStreams& all_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_ = nullptr;
};

class Queue : public CudaQueue {
 public:
  Queue(int device, CopyStreams& copyStreams) : device_(chosen(device)), copyStreams_(copyStreams) {
    checkCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  }
  ~Queue() override {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }

  void begin() override { begun_ = cudaSetDevice(device_); }
  void write(void* device, const void* host, size_t bytes) override {
    leaveCapture();
    staging_.write(stream(), static_cast<char*>(device), static_cast<const char*>(host), bytes);
  }
  void read(void* host, const void* device, size_t bytes) override {
    leaveCapture();
    staging_.read(stream(), static_cast<char*>(host), static_cast<const char*>(device), bytes);
  }
  std::unique_ptr<DeviceCopy> beginWrite(void* device, const void* pinned, size_t bytes) override {
    return beginCopy(device, pinned, bytes, cudaMemcpyHostToDevice);
  }
  std::unique_ptr<DeviceCopy> beginRead(void* pinned, const void* device, size_t bytes) override {
    return beginCopy(pinned, device, bytes, cudaMemcpyDeviceToHost);
  }
  void await(std::unique_ptr<DeviceCopy> copy) override {
    leaveCapture();
    static_cast<Copy&>(*copy).awaitOn(stream());
  }
  void wait() override {
    leaveCapture();
    checkCuda(cudaStreamSynchronize(stream()), "a kernel");
  }

  std::unique_ptr<DeviceGraph> capture(const std::function<void()>& body) override {
    // Relaxed: what an operation allocates meanwhile is no part of the graph.
    checkCuda(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed), "beginning a graph");
    capture_ = Capture::under_way;
    body();
    const bool whole = capture_ == Capture::under_way;
    capture_ = Capture::none;
    cudaGraph_t graph = nullptr;
    checkCuda(cudaStreamEndCapture(stream(), &graph), "ending a graph");
    const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, cudaError_t (*)(cudaGraph_t)> owned(graph,
                                                                                                  cudaGraphDestroy);
    return whole ? std::make_unique<Graph>(graph, stream()) : nullptr;
  }

 private:
  enum class Capture { none, under_way, left };

  /// What no graph can hold: the operation that asked for it is left, and the graph given up.
  void leaveCapture() {
    if (capture_ == Capture::none) return;
    capture_ = Capture::left;
    fail("ERR_QLORA_INTERNAL", "a graph cannot wait for the host");
  }

  std::unique_ptr<DeviceCopy> beginCopy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    leaveCapture();
    const cudaStream_t after = stream();
    if (!copies_) copies_.emplace(copyStreams_);
    return copies_->begin(after, to, from, bytes, kind);
  }

  static int chosen(int device) {
    checkCuda(cudaSetDevice(device), "choosing the device");
    return device;
  }

  const int device_;
  CopyStreams& copyStreams_;
  Staging staging_;
  std::optional<Copies> copies_;  // where any was asked for
  Capture capture_ = Capture::none;
};

class CudaDevice : public Device {
 public:
  CudaDevice(int index, DeviceDescription description) : Device(index), description_(std::move(description)) {}

  const DeviceDescription& description() const override { return description_; }

  uint64_t freeBytes() const override {
    size_t free = 0, total = 0;
    checkCuda(cudaSetDevice(index), "choosing the device");
    checkCuda(cudaMemGetInfo(&free, &total), "asking for free memory");
    return free;
  }

  void* allocate(size_t bytes) override {
    void* pointer = nullptr;
    checkCuda(cudaSetDevice(index), "choosing the device");
    const cudaError_t error = cudaMalloc(&pointer, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // which would be reported to the next launch
      return nullptr;
    }
    checkCuda(error, "taking memory");
    return pointer;
  }

  void release(void* pointer) override {
    cudaSetDevice(index);
    cudaFree(pointer);
  }

  void* allocatePinned(size_t bytes) override {
    void* pointer = nullptr;
    checkCuda(cudaSetDevice(index), "choosing the device");
    const cudaError_t error = cudaHostAlloc(&pointer, bytes, cudaHostAllocDefault);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // which would be reported to the next launch
      return nullptr;
    }
    checkCuda(error, "taking pinned memory");
    return pointer;
  }

  void releasePinned(void* pointer) override {
    cudaSetDevice(index);
    copyStreams_.wait();  // a copy may use it yet
    cudaFreeHost(pointer);
  }

  std::unique_ptr<DeviceQueue> makeQueue() override { return std::make_unique<Queue>(index, copyStreams_); }

 private:
  CopyStreams copyStreams_;
  const DeviceDescription description_;
};

}  // namespace

int deviceCount() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
#if defined(__CUDACC__)
  if (error == cudaErrorNoDevice) return 0;
#endif
  checkCuda(error, "counting devices");
  return count;
}

std::unique_ptr<Device> openDevice(int index) {
  cudaDeviceProp found;
  checkCuda(cudaGetDeviceProperties(&found, index), "describing the device");
  if (found.major * 10 + found.minor < kLowestMajor * 10 + kLowestMinor) {
    throw Error("ERR_QLORA_DEVICE",
                "cuda:" + std::to_string(index) + ", " + found.name + ", has compute capability " +
                    std::to_string(found.major) + "." + std::to_string(found.minor) + ", at least " +
                    std::to_string(kLowestMajor) + "." + std::to_string(kLowestMinor) + " is needed",
                "Use a GPU of the Turing generation or later, or device: 'cpu'.");
  }
  return std::make_unique<CudaDevice>(
      index, DeviceDescription{found.name, found.totalGlobalMem, found.major, found.minor, found.multiProcessorCount});
}

}  // namespace qlora::cuda
