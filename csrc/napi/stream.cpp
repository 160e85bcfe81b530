#include <sys/resource.h>

#include "napi/bind.h"
#include "ops/cpu_choice.h"
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
    enqueue(*stream, std::move(args), stream->ops().*kernel, name);
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

/// new Stream() computes; new Stream('rehearsal') only counts the memory that computing would take.
StreamHandle::StreamHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<StreamHandle>(info) {
  guarded(info.Env(), [&]() -> Napi::Value {
    info.This().As<Napi::Object>().TypeTag(&kStreamTag);
    threadPool();  // where its threads cannot be started, that is thrown here and not on the stream's thread
    const Backing backing = info[0].IsUndefined() ? Backing::pages : Backing::addresses;
    stream = std::make_shared<Stream>(std::make_shared<Memory>(backing), cpuTable());
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
        info.Env(), stream, [](Context&) {}, [](Napi::Env env) { return env.Undefined(); });
  });
}

Napi::Value StreamHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    stream->close();
    stream->memory().trim();
    return info.Env().Undefined();
  });
}

Napi::Value StreamHandle::memory(const Napi::CallbackInfo& info) {
  return counts(info.Env(), stream->memory().counter());
}

Napi::Value StreamHandle::setMemoryLimit(const Napi::CallbackInfo& info) {
  stream->memory().setLimit(info[0].ToNumber().Int64Value());
  return info.Env().Undefined();
}

/// Resolves to {operations: {name: {calls, seconds}}, minorFaults} of what has run since the last such call.
/// minorFaults are the pages that the system gave to the stream's thread since it began.
Napi::Value StreamHandle::usage(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    struct Usage {
      Stream::Times times;
      int64_t minorFaults = 0;
    };
    auto usage = std::make_shared<Usage>();
    return onStream(
        info.Env(), stream,
        [usage, own = stream.get()](Context&) {
          usage->times.swap(own->times());
          usage->minorFaults = minorFaultsOfThread();
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
                                   std::shared_ptr<const Recording> recording) {
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

static Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData(env);
  env.SetInstanceData(data);
  Napi::Function streamClass = StreamHandle::define(env), tensorClass = TensorHandle::define(env);
  data->recordingClass = Napi::Persistent(RecordingHandle::define(env));
  data->streamClass = Napi::Persistent(streamClass);
  data->tensorClass = Napi::Persistent(tensorClass);
  exports.Set("Stream", streamClass);
  exports.Set("Tensor", tensorClass);
  exports.Set("processMemory", Napi::Function::New(env, processMemoryOf));
  exports.Set("cpu", Napi::Function::New(env, cpuInformation));

  Napi::Object ops = Napi::Object::New(env);
#define QLORA_DEFINE_OP(function, Args)                                            \
  ops.Set(#function, Napi::Function::New(env, [](const Napi::CallbackInfo& info) { \
            return callOperation<Args>(info, &OpTable::function, #function);       \
          }));
  QLORA_OPS(QLORA_DEFINE_OP)
#undef QLORA_DEFINE_OP
  exports.Set("ops", ops);
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
