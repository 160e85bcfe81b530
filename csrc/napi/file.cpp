// Files as JavaScript sees them. Whatever waits for a disk runs on a stream's thread or, where no tensor is involved,
// on one of Node's background threads.
#include "core/file.h"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/safetensors.h"
#include "napi/bind.h"

namespace qlora {

namespace {

constexpr double kMaxBytesToJavaScript = 1 << 20;

/// Runs `body` in the background; the promise resolves to `result`, which is kept alive meanwhile.
class BackgroundTask : public Napi::AsyncWorker {
 public:
  static Napi::Promise start(Napi::Env env, std::function<void()> body, Napi::Object result) {
    auto* task = new BackgroundTask(env, std::move(body), result);
    const Napi::Promise promise = task->deferred_.Promise();
    task->Queue();
    return promise;
  }

 protected:
  void Execute() override {
    try {
      body_();
    } catch (...) {
      error_ = currentError();
    }
  }
  void OnOK() override {
    if (error_) {
      deferred_.Reject(toJavaScript(Env(), *error_).Value());
    } else {
      deferred_.Resolve(result_.Value());
    }
  }

 private:
  BackgroundTask(Napi::Env env, std::function<void()> body, Napi::Object result)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        body_(std::move(body)),
        result_(Napi::Persistent(result)) {}

  Napi::Promise::Deferred deferred_;
  std::function<void()> body_;
  Napi::ObjectReference result_;
  std::shared_ptr<const Error> error_;
};

/// A value that holds `object` until it is made.
Completions::Value keeping(Napi::Object object) {
  return [kept = std::make_shared<Napi::ObjectReference>(Napi::Persistent(object))](Napi::Env env) {
    return env.Undefined();
  };
}

/// An open safetensors file: its bytes and what its header says.
struct OpenSafetensors {
  explicit OpenSafetensors(const std::string& path) : file(path) {
    unsigned char prefix[8] = {};
    file.read(prefix, std::min<uint64_t>(sizeof prefix, file.size()), 0);
    try {
      const uint32_t length = safetensorsHeaderLength(prefix, file.size());
      std::unique_ptr<char[]> text(new char[length]);
      file.read(text.get(), length, sizeof prefix);
      dataStart = sizeof prefix + length;
      header = SafetensorsHeader(std::move(text), length, file.size() - dataStart);
    } catch (const Error& error) {
      if (error.code != "ERR_QLORA_SAFETENSORS") throw;
      throw Error(error.code, path + ": " + error.what(), error.hint);
    }
  }

  InputFile file;
  SafetensorsHeader header;
  uint64_t dataStart = 0;
};

/// new SafetensorsFile(path), then `await open()`.
class SafetensorsHandle : public Napi::ObjectWrap<SafetensorsHandle> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "SafetensorsFile",
        {InstanceMethod<&SafetensorsHandle::open>("open"), InstanceMethod<&SafetensorsHandle::count>("count"),
         InstanceMethod<&SafetensorsHandle::tensors>("tensors"),
         InstanceMethod<&SafetensorsHandle::metadata>("metadata"), InstanceMethod<&SafetensorsHandle::read>("read"),
         InstanceMethod<&SafetensorsHandle::readFinite>("readFinite"),
         InstanceMethod<&SafetensorsHandle::readBytes>("readBytes"),
         InstanceMethod<&SafetensorsHandle::close>("close")});
  }

  explicit SafetensorsHandle(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<SafetensorsHandle>(info), path_(info[0].ToString().Utf8Value()) {}

 private:
  using Shared = std::shared_ptr<OpenSafetensors>;
  using Reader = void (*)(const OpenSafetensors&, const Tensor&, uint64_t offset, Context&);

  const Shared& opened() const {
    if (!file_) fail("ERR_QLORA_DISPOSED", "%s: the file is not open", path_.c_str());
    return file_;
  }

  /// Where in the file `bytes` bytes from `at` of its data on begin.
  uint64_t checkedOffset(const OpenSafetensors& file, double at, uint64_t bytes) const {
    const uint64_t held = file.file.size() - file.dataStart;
    if (!(at >= 0) || at > static_cast<double>(held) || bytes > held - static_cast<uint64_t>(at)) {
      fail("ERR_QLORA_ARGUMENT", "%s: %llu bytes from %.0f on were wanted, it holds %llu", path_.c_str(),
           static_cast<unsigned long long>(bytes), at, static_cast<unsigned long long>(held));
    }
    return file.dataStart + static_cast<uint64_t>(at);
  }

  Napi::Value open(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      return BackgroundTask::start(
          info.Env(), [this] { file_ = std::make_shared<OpenSafetensors>(path_); }, info.This().As<Napi::Object>());
    });
  }

  /// {tensors, metadata}: how many there are.
  Napi::Value count(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      Napi::Object result = Napi::Object::New(info.Env());
      result.Set("tensors", static_cast<double>(opened()->header.entries().size()));
      result.Set("metadata", static_cast<double>(opened()->header.metadata().size()));
      return result;
    });
  }

  Napi::String text(Napi::Env env, SafetensorsHeader::Text t) const {
    const std::string_view view = file_->header.view(t);
    return Napi::String::New(env, view.data(), view.size());
  }

  /// tensors(from, to): [name, dtype, shape, begin, end] of each, a slice at a time since there may be millions.
  Napi::Value tensors(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Napi::Env env = info.Env();
      const SafetensorsHeader& header = opened()->header;
      const size_t from = info[0].ToNumber().Uint32Value();
      const size_t to = std::min<size_t>(info[1].ToNumber().Uint32Value(), header.entries().size());
      Napi::Array result = Napi::Array::New(env);
      for (size_t i = from; i < to; ++i) {
        const SafetensorsHeader::Entry& entry = header.entries()[i];
        const std::vector<uint64_t> dims = header.shape(entry);
        Napi::Array shape = Napi::Array::New(env, dims.size());
        for (uint32_t d = 0; d < dims.size(); ++d) shape.Set(d, static_cast<double>(dims[d]));
        Napi::Array row = Napi::Array::New(env, 5);
        row.Set(0u, text(env, entry.name));
        row.Set(1u, kSafetensorsDTypes[entry.dtype].name);
        row.Set(2u, shape);
        row.Set(3u, static_cast<double>(entry.begin));
        row.Set(4u, static_cast<double>(entry.end));
        result.Set(static_cast<uint32_t>(i - from), row);
      }
      return result;
    });
  }

  /// metadata(from, to): [key, value] of each.
  Napi::Value metadata(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Napi::Env env = info.Env();
      const SafetensorsHeader& header = opened()->header;
      const size_t from = info[0].ToNumber().Uint32Value();
      const size_t to = std::min<size_t>(info[1].ToNumber().Uint32Value(), header.metadata().size());
      Napi::Array result = Napi::Array::New(env);
      for (size_t i = from; i < to; ++i) {
        Napi::Array row = Napi::Array::New(env, 2);
        row.Set(0u, text(env, header.metadata()[i].key));
        row.Set(1u, text(env, header.metadata()[i].value));
        result.Set(static_cast<uint32_t>(i - from), row);
      }
      return result;
    });
  }

  /// (tensor, byteOffset, name): fills the tensor with the bytes of the data from there on when its stream comes to it;
  /// the name is for messages.
  Napi::Value readWith(const Napi::CallbackInfo& info, Reader reader) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Shared file = opened();
      const TensorHandle& handle = TensorHandle::of(info[0]);
      const Tensor target = handle.tensor();
      const uint64_t offset = checkedOffset(*file, info[1].ToNumber().DoubleValue(), target.storage->bytes);
      return onStream(
          info.Env(), handle.stream(),
          [file, target, offset, reader, name = info[2].ToString().Utf8Value()](Context& context) {
            try {
              if (!target.storage->pages) target.storage->allocate();
              reader(*file, target, offset, context);
            } catch (...) {
              const auto error = currentError();
              target.storage->error =
                  std::make_shared<Error>(error->code, "tensor " + quoted(name) + ": " + error->what(), error->hint);
              throw Error(*target.storage->error);
            }
            target.storage->error = nullptr;
            target.storage->hostCopy = nullptr;
          },
          keeping(info.This().As<Napi::Object>()));
    });
  }

  Napi::Value read(const Napi::CallbackInfo& info) {
    return readWith(info, [](const OpenSafetensors& file, const Tensor& t, uint64_t offset, Context& context) {
      const Storage& to = *t.storage;
      if (to.pages) return readIntoPages(file.file, *to.pages, to.pageOffset, to.bytes, offset);
      if (context.queue) {
        return readIntoDevice(file.file, *context.queue, to.data, to.bytes, offset, nullptr, context.pool);
      }
      readParallel(file.file, to.data, to.bytes, offset, context.pool);
    });
  }

  Napi::Value readFinite(const Napi::CallbackInfo& info) {
    return readWith(info, [](const OpenSafetensors& file, const Tensor& t, uint64_t offset, Context& context) {
      Storage& to = *t.storage;
      to.allocate();
      if (context.queue) {
        return readIntoDevice(file.file, *context.queue, to.data, to.bytes, offset, &t.dtype, context.pool);
      }
      readFiniteParallel(file.file, to.data, to.bytes, offset, t.dtype, context.pool);
    });
  }

  /// readBytes(byteOffset, bytes): Promise of a Uint8Array.
  Napi::Value readBytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Shared file = opened();
      const double at = info[0].ToNumber().DoubleValue(), bytes = info[1].ToNumber().DoubleValue();
      if (!(bytes >= 0 && bytes <= kMaxBytesToJavaScript)) {
        fail("ERR_QLORA_ARGUMENT", "%s: %.0f bytes are too many to read at once", path_.c_str(), bytes);
      }
      const uint64_t offset = checkedOffset(*file, at, static_cast<uint64_t>(bytes));
      Napi::Uint8Array result = Napi::Uint8Array::New(info.Env(), static_cast<size_t>(bytes));
      return BackgroundTask::start(
          info.Env(),
          [file, offset, data = result.Data(), n = result.ByteLength()] { file->file.read(data, n, offset); }, result);
    });
  }

  /// Reads under way are finished first.
  Napi::Value close(const Napi::CallbackInfo& info) {
    file_ = nullptr;
    return info.Env().Undefined();
  }

  const std::string path_;
  Shared file_;
};

/// What one file is made of, collected from JavaScript.
struct Content {
  std::vector<Tensor> tensors;  // a tensor or, where undefined, the view beside it
  std::vector<FilePart> views;
  std::shared_ptr<Stream> stream;

  Content(const Napi::Array& parts) {
    for (uint32_t i = 0; i < parts.Length(); ++i) {
      const Napi::Value part = parts.Get(i);
      if (part.IsTypedArray()) {
        const Napi::TypedArray array = part.As<Napi::TypedArray>();
        views.push_back(
            {static_cast<const char*>(array.ArrayBuffer().Data()) + array.ByteOffset(), array.ByteLength()});
        tensors.emplace_back();
        continue;
      }
      const TensorHandle& handle = TensorHandle::of(part);
      if (stream && stream != handle.stream())
        fail("ERR_QLORA_ARGUMENT", "a file is written from tensors of one stream");
      stream = handle.stream();
      views.push_back({});
      tensors.push_back(handle.tensor());
    }
  }

  /// `queue` as a context has it.
  void write(const std::string& path, const std::string& temporary, DeviceQueue* queue) const {
    std::vector<FilePart> parts = views;
    detail::FindError inputs;
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!tensors[i].defined()) continue;
      inputs.state({tensors[i]});
      const Storage& from = *tensors[i].storage;
      parts[i] = {from.data, from.bytes, from.pages.get(), from.pageOffset, queue};
    }
    if (inputs.error) throw Error(*inputs.error);
    writeFile(path, temporary, parts);
  }
};

/// writeFile(path, temporaryPath, parts): Promise. Parts are tensors and typed arrays, which are read later and so may
/// not change until the promise is settled.
Napi::Value writeFileFrom(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const std::string path = info[0].ToString(), temporary = info[1].ToString();
    if (!info[2].IsArray()) fail("ERR_QLORA_ARGUMENT", "writeFile takes an array of tensors and typed arrays");
    const Napi::Array array = info[2].As<Napi::Array>();
    auto content = std::make_shared<Content>(array);
    // Not left to the task: the last to let go of a stream must not be its own thread.
    const std::shared_ptr<Stream> stream = std::move(content->stream);
    if (!stream) {
      return BackgroundTask::start(
          info.Env(), [=] { content->write(path, temporary, nullptr); }, array);
    }
    return onStream(
        info.Env(), stream, [=](Context& context) { content->write(path, temporary, context.queue); }, keeping(array));
  });
}

}  // namespace

void defineFiles(Napi::Env env, Napi::Object exports) {
  exports.Set("SafetensorsFile", SafetensorsHandle::define(env));
  exports.Set("writeFile", Napi::Function::New(env, writeFileFrom));
}

}  // namespace qlora
