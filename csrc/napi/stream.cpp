#include <sys/resource.h>

#include <limits>

#include "napi/bind.h"
#include "ops/cpu_choice.h"
#include "ops/cuda_select.h"
#include "ops/op_table.h"

namespace qlora {

namespace {

const napi_type_tag kStreamTag = {0x716c6f7261737472, 0x65616d0000000001};

/// Pages that the system has given to the calling thread; 0 where it does not count them.
int64_t minorFaultsOfThread() {
#if defined(__linux__)
  rusage usage;
  if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_minflt;
#endif
  return 0;
}

Napi::Object counts(Napi::Env env, const MemoryCounter& counter) {
  Napi::Object result = Napi::Object::New(env);
  result.Set("liveBytes", static_cast<double>(counter.live()));
  result.Set("peakBytes", static_cast<double>(counter.peak()));
  Napi::Object byClass = Napi::Object::New(env), peakByClass = Napi::Object::New(env);
  for (int i = 0; i < kMemoryClasses; ++i) {
    byClass.Set(kMemoryClassNames[i], static_cast<double>(counter.live(i)));
    peakByClass.Set(kMemoryClassNames[i], static_cast<double>(counter.peak(i)));
  }
  result.Set("byClass", byClass);
  result.Set("peakByClass", peakByClass);
  return result;
}

template <class Args>
Napi::Value callOperation(const Napi::CallbackInfo& info, void (*const OpTable::*kernel)(Context&, const Args&),
                          std::string_view name) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const std::shared_ptr<Stream>& stream = StreamHandle::of(info[0]).stream;
    Args args{};
    ArgumentReader reader(info, stream);
    args.visit(reader);
    reader.finish();
    const auto function = stream->ops().*kernel;
    if (!function) {
      throw Error("ERR_QLORA_DEVICE",
                  std::string(stream->ops().name) + " does not have the operation " + std::string(name) + " yet",
                  "Use device: 'cpu'.");
    }
    enqueue(*stream, std::move(args), function, name);
    return info.Env().Undefined();
  });
}

}  // namespace

Napi::Function StreamHandle::define(Napi::Env env) {
  return DefineClass(
      env, "Stream",
      {InstanceMethod<&StreamHandle::sync>("sync"), InstanceMethod<&StreamHandle::close>("close"),
       InstanceMethod<&StreamHandle::memory>("memory"), InstanceMethod<&StreamHandle::setMemoryLimit>("setMemoryLimit"),
       InstanceMethod<&StreamHandle::usage>("usage"), InstanceMethod<&StreamHandle::record>("record")});
}

namespace {

/// The device of that number, which may be any.
std::shared_ptr<Device> deviceOf(const Napi::Value& number) {
  const double index = number.ToNumber().DoubleValue();
  if (!(index >= 0 && index <= std::numeric_limits<int>::max())) {
    fail("ERR_QLORA_DEVICE", "there is no device cuda:%.0f", index);
  }
  return cudaDevice(static_cast<int>(index));
}

/// `cuda` is the device's number, undefined on the CPU. A rehearsal has the device's operations and no queue.
std::shared_ptr<Stream> makeStream(const Napi::Value& cuda, bool rehearsal) {
  if (cuda.IsUndefined()) {
    return std::make_shared<Stream>(std::make_shared<Memory>(rehearsal ? Backing::addresses : Backing::pages),
                                    cpuTable());
  }
  const std::shared_ptr<Device> device = deviceOf(cuda);
  if (rehearsal) {
    return std::make_shared<Stream>(std::make_shared<Memory>(Backing::addresses, MemoryPlace::device),
                                    *cudaPlugin().ops, device, nullptr, std::make_shared<Memory>(Backing::addresses));
  }
  return std::make_shared<Stream>(std::make_shared<Memory>(device, MemoryPlace::device), *cudaPlugin().ops, device,
                                  device->makeQueue(), std::make_shared<Memory>(device, MemoryPlace::host));
}

}  // namespace

/// new Stream(cuda) computes; new Stream(cuda, 'rehearsal') only counts the memory that computing would take.
StreamHandle::StreamHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<StreamHandle>(info) {
  guarded(info.Env(), [&]() -> Napi::Value {
    info.This().As<Napi::Object>().TypeTag(&kStreamTag);
    threadPool();  // where its threads cannot be started, that is thrown here and not on the stream's thread
    stream = makeStream(info[0], !info[1].IsUndefined());
    auto& streams = info.Env().GetInstanceData<AddonData>()->streams;
    std::erase_if(streams, [](const std::weak_ptr<Stream>& s) { return s.expired(); });
    streams.push_back(stream);
    return info.Env().Undefined();
  });
}

StreamHandle& StreamHandle::of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kStreamTag)) {
    fail("ERR_QLORA_ARGUMENT", "expected a stream");
  }
  return *Napi::ObjectWrap<StreamHandle>::Unwrap(value.As<Napi::Object>());
}

/// Resolves when everything enqueued before it has run.
Napi::Value StreamHandle::sync(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return onStream(
        info.Env(), stream,
        [](Context& context) {
          if (context.queue) context.queue->wait();
        },
        [](Napi::Env env) { return env.Undefined(); });
  });
}

Napi::Value StreamHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    stream->close();
    stream->memory().trim();
    if (stream->pinned()) stream->pinned()->trim();
    return info.Env().Undefined();
  });
}

Napi::Value StreamHandle::memory(const Napi::CallbackInfo& info) {
  Napi::Object result = counts(info.Env(), stream->memory().counter());
  result.Set("mappedBytes", static_cast<double>(stream->memory().mappedBytes()));
  const MemoryCounter* pinned = stream->pinned() ? &stream->pinned()->counter() : nullptr;
  result.Set("pinnedBytes", static_cast<double>(pinned ? pinned->live() : 0));
  result.Set("pinnedPeakBytes", static_cast<double>(pinned ? pinned->peak() : 0));
  return result;
}

Napi::Value StreamHandle::setMemoryLimit(const Napi::CallbackInfo& info) {
  stream->memory().setLimit(info[0].ToNumber().Int64Value());
  return info.Env().Undefined();
}

/// Resolves to {operations: {name: {calls, seconds}}, minorFaults, kernels}: operations of what has run since the last
/// such call; the pages that the system gave to the stream's thread, and the kernels that it enqueued, since it began.
Napi::Value StreamHandle::usage(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    struct Usage {
      Stream::Times times;
      int64_t minorFaults = 0, kernels = 0;
    };
    auto usage = std::make_shared<Usage>();
    return onStream(
        info.Env(), stream,
        [usage, own = stream.get()](Context& context) {
          usage->times.swap(own->times());
          usage->minorFaults = minorFaultsOfThread();
          if (context.queue) usage->kernels = context.queue->kernels;
        },
        [usage](Napi::Env env) {
          Napi::Object operations = Napi::Object::New(env);
          for (const auto& [name, time] : usage->times) {
            Napi::Object entry = Napi::Object::New(env);
            entry.Set("calls", static_cast<double>(time.calls));
            entry.Set("seconds", time.seconds);
            operations.Set(std::string(name), entry);
          }
          Napi::Object result = Napi::Object::New(env);
          result.Set("operations", operations);
          result.Set("minorFaults", static_cast<double>(usage->minorFaults));
          result.Set("kernels", static_cast<double>(usage->kernels));
          return result;
        });
  });
}

/// record(f): calls f and returns, as a Recording, the operations that it enqueued; none of them has run.
Napi::Value StreamHandle::record(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    stream->record();
    try {
      info[0].As<Napi::Function>().Call({});
    } catch (...) {
      stream->takeRecording();
      throw;
    }
    return RecordingHandle::wrap(info.Env(), stream, stream->takeRecording());
  });
}

Napi::Function RecordingHandle::define(Napi::Env env) {
  return DefineClass(
      env, "Recording",
      {InstanceMethod<&RecordingHandle::run>("run"), InstanceMethod<&RecordingHandle::dispose>("dispose")});
}

Napi::Object RecordingHandle::wrap(Napi::Env env, std::shared_ptr<Stream> stream,
                                   std::shared_ptr<Recording> recording) {
  Napi::Object object = env.GetInstanceData<AddonData>()->recordingClass.New({});
  RecordingHandle& handle = *Unwrap(object);
  handle.stream_ = std::move(stream);
  handle.recording_ = std::move(recording);
  return object;
}

Napi::Value RecordingHandle::run(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    if (!recording_) fail("ERR_QLORA_DISPOSED", "this recording was disposed of");
    stream_->run(recording_);
    return info.Env().Undefined();
  });
}

Napi::Value RecordingHandle::dispose(const Napi::CallbackInfo& info) {
  release();
  return info.Env().Undefined();
}

void RecordingHandle::release() {
  if (!recording_) return;
  // What it holds goes in the stream's order, after the last run; at once where the stream is closed.
  try {
    stream_->post([recording = std::move(recording_)](Context&) {});
  } catch (const Error&) {
  }
  recording_ = nullptr;
}

static Napi::Value processMemoryOf(const Napi::CallbackInfo& info) { return counts(info.Env(), processMemory()); }

static Napi::Value cpuInformation(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    Napi::Object result = Napi::Object::New(info.Env());
    Napi::Array isas = Napi::Array::New(info.Env());
    const CpuTables here = cpuTables();
    for (int i = 0; i < here.count; ++i) isas.Set(static_cast<uint32_t>(i), here.tables[i]->name);
    result.Set("instructionSets", isas);
    const CpuChoice choice = cpuChoice();
    result.Set("inUse", choice.table->name);
    result.Set("chosen", choice.reason);
    result.Set("threads", threadPool().size());
    return result;
  });
}

/// {name, memoryBytes, capability}, or {error} where this device cannot be used.
static Napi::Object describe(Napi::Env env, int index) {
  Napi::Object entry = Napi::Object::New(env);
  try {
    const DeviceDescription& description = cudaDevice(index)->description();
    entry.Set("name", description.name);
    entry.Set("memoryBytes", static_cast<double>(description.memoryBytes));
    entry.Set("capability", std::to_string(description.major) + "." + std::to_string(description.minor));
  } catch (const Error& error) {
    entry.Set("error", toJavaScript(env, error).Value());
  }
  return entry;
}

/// What CUDA's plugin offers: {devices, lacks: operations}; throws where CUDA cannot be used at all.
static Napi::Value cudaInformation(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Env env = info.Env();
    const CudaPlugin& plugin = cudaPlugin();
    const int count = plugin.deviceCount();
    if (count == 0) cudaDevice(0);  // says why
    Napi::Array list = Napi::Array::New(env), lacks = Napi::Array::New(env);
    for (int i = 0; i < count; ++i) list.Set(static_cast<uint32_t>(i), describe(env, i));
#define QLORA_ADD_LACKING(function, Args) \
  if (!plugin.ops->function) lacks.Set(lacks.Length(), #function);
    QLORA_OPS(QLORA_ADD_LACKING)
#undef QLORA_ADD_LACKING
    Napi::Object result = Napi::Object::New(env);
    result.Set("devices", list);
    result.Set("lacks", lacks);
    return result;
  });
}

/// Of the CUDA devices that this process has opened: [{index, ...memory}]. Opens none.
static Napi::Value cudaMemory(const Napi::CallbackInfo& info) {
  Napi::Array result = Napi::Array::New(info.Env());
  for (const auto& device : openedCudaDevices()) {
    Napi::Object entry = counts(info.Env(), device->counter);
    entry.Set("index", device->index);
    result.Set(result.Length(), entry);
  }
  return result;
}

/// cudaFreeBytes(index): what the device has free at this moment. Throws where it cannot be used.
static Napi::Value cudaFreeBytes(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const uint64_t bytes = deviceOf(info[0])->freeBytes();
    return Napi::Number::New(info.Env(), static_cast<double>(bytes));
  });
}

static Napi::Value cudaDriver(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), hasCudaDriver());
}

static Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData(env);
  env.SetInstanceData(data);
  Napi::Function streamClass = StreamHandle::define(env);
  data->recordingClass = Napi::Persistent(RecordingHandle::define(env));
  data->streamClass = Napi::Persistent(streamClass);
  exports.Set("Stream", streamClass);
  exports.Set("processMemory", Napi::Function::New(env, processMemoryOf));
  exports.Set("cpu", Napi::Function::New(env, cpuInformation));
  exports.Set("cuda", Napi::Function::New(env, cudaInformation));
  exports.Set("cudaFreeBytes", Napi::Function::New(env, cudaFreeBytes));
  exports.Set("cudaMemory", Napi::Function::New(env, cudaMemory));
  exports.Set("cudaDriver", Napi::Function::New(env, cudaDriver));

  Napi::Object ops = Napi::Object::New(env);
#define QLORA_DEFINE_OP(function, Args)                                            \
  ops.Set(#function, Napi::Function::New(env, [](const Napi::CallbackInfo& info) { \
            return callOperation<Args>(info, &OpTable::function, #function);       \
          }));
  QLORA_OPS(QLORA_DEFINE_OP)
#undef QLORA_DEFINE_OP
  exports.Set("ops", ops);
  defineTensors(env, exports);
  defineFiles(env, exports);
  definePageFiles(env, exports);

  // process.exit() and worker.terminate() come here in mid-work: what runs is waited for, the rest is dropped.
  env.AddCleanupHook([data] {
    for (const auto& weak : data->streams) {
      if (const auto stream = weak.lock()) stream->close();
    }
    data->completions->shutDown();
  });
  return exports;
}

NODE_API_MODULE(qlora_node, initialize)

}  // namespace qlora
