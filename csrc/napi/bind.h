// The border to JavaScript: errors, arguments, promises. Nothing here knows an operation.
#pragma once

// A worker that is being terminated takes neither results nor exceptions; without this, offering it one aborts.
#define NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS
#include <napi.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/operation.h"
#include "core/stream.h"

namespace qlora {

/// The error as JavaScript sees it: an Error with `code` and `hint`, which lib/native.ts turns into a QLoRAError.
Napi::Error toJavaScript(Napi::Env env, const Error& error);

/// Runs body; whatever it throws becomes a JavaScript exception. Every callback of the addon goes through here.
template <class Body>
Napi::Value guarded(Napi::Env env, Body&& body) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (...) {
    throw toJavaScript(env, *currentError());
  }
}

/// What one JavaScript thread (environment) has of the addon: the promises that streams will settle.
class Completions : public std::enable_shared_from_this<Completions> {
 public:
  explicit Completions(Napi::Env env);

  /// Makes the value of a promise, on env's thread, and holds whatever JavaScript values must stay alive until then.
  using Value = std::function<Napi::Value(Napi::Env)>;
  /// A promise that is settled, and its stream, which lives until then.
  struct Completion {
    Napi::Promise::Deferred deferred;
    Value value;
    std::shared_ptr<Stream> stream;
    std::shared_ptr<const Error> error;
  };
  /// Settles a promise, from any thread, once. One that goes unsettled rejects it: a closed stream dropped its task.
  class Settle {
   public:
    Settle(std::shared_ptr<Completions> completions, std::unique_ptr<Completion> completion)
        : completions_(std::move(completions)), completion_(std::move(completion)) {}
    Settle(const Settle&) = delete;
    Settle& operator=(const Settle&) = delete;
    ~Settle();
    void operator()(std::shared_ptr<const Error> error);

   private:
    std::shared_ptr<Completions> completions_;
    std::unique_ptr<Completion> completion_;
  };
  Napi::Promise add(Napi::Env env, std::shared_ptr<Stream> stream, Value value, std::shared_ptr<Settle>& settle);

  /// Called when the environment goes: nothing is settled any more.
  void shutDown();

 private:
  /// A completion on its way to env's thread, to which what it keeps alive belongs.
  struct Delivery {
    std::shared_ptr<Completions> owner;
    std::unique_ptr<Completion> completion;
  };
  static void deliverPending(napi_env env, napi_value, void*, void* data);
  void deliver(std::unique_ptr<Completion> completion);

  std::mutex mutex_;
  napi_threadsafe_function function_ = nullptr;
  int64_t waiting_ = 0;  // on env's thread only
};

/// A promise of what `value` makes once the stream has run `task`; rejected with what that throws, and with
/// ERR_QLORA_DISPOSED where the stream is closed before it comes to it. `task` may hold nothing of JavaScript's.
Napi::Promise onStream(Napi::Env env, const std::shared_ptr<Stream>& stream, std::function<void(Context&)> task,
                       Completions::Value value);

/// Per-environment state of the addon.
struct AddonData {
  explicit AddonData(Napi::Env env) : completions(std::make_shared<Completions>(env)) {}

  std::shared_ptr<Completions> completions;
  Napi::FunctionReference streamClass, recordingClass;
  std::vector<std::weak_ptr<Stream>> streams;
};

class StreamHandle : public Napi::ObjectWrap<StreamHandle> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit StreamHandle(const Napi::CallbackInfo& info);
  static StreamHandle& of(const Napi::Value& value);

  std::shared_ptr<Stream> stream;

 private:
  Napi::Value sync(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  Napi::Value memory(const Napi::CallbackInfo& info);
  Napi::Value setMemoryLimit(const Napi::CallbackInfo& info);
  Napi::Value usage(const Napi::CallbackInfo& info);
  Napi::Value record(const Napi::CallbackInfo& info);
};

/// Made by stream.record(f): what f enqueued.
class RecordingHandle : public Napi::ObjectWrap<RecordingHandle> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit RecordingHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RecordingHandle>(info) {}
  ~RecordingHandle() override { release(); }
  static Napi::Object wrap(Napi::Env env, std::shared_ptr<Stream> stream, std::shared_ptr<Recording> recording);

 private:
  Napi::Value run(const Napi::CallbackInfo& info);
  Napi::Value dispose(const Napi::CallbackInfo& info);
  void release();

  std::shared_ptr<Stream> stream_;
  std::shared_ptr<Recording> recording_;
};

/// A tensor as JavaScript holds it, in an External, of which the addon makes no others. Disposed of, it may become the handle of another: a training step
/// makes thousands of tensors, and V8 would have to finalize a handle of each.
class TensorHandle {
 public:
  static TensorHandle& of(const Napi::Value& value);
  /// A handle of the tensor: `spare`, or a new one where that is undefined. V8 is told of `toldBytes`.
  static Napi::Value make(const Napi::Value& spare, std::shared_ptr<Stream> stream, Tensor tensor,
                          int64_t toldBytes = 0);

  /// Throws where it was disposed of.
  const Tensor& tensor() const;
  const std::shared_ptr<Stream>& stream() const { return stream_; }
  /// Its tensor goes in the stream's order; nothing where that has happened.
  void dispose(Napi::Env env);

 private:
  std::shared_ptr<Stream> stream_;
  Tensor tensor_;
  int64_t toldBytes_ = 0;
};

/// Rank and shape from the arguments from `first` on, non-negative integers.
void readShape(const Napi::CallbackInfo& info, size_t first, Tensor& t);
DType readDType(const Napi::Value& value);

/// Reads an operation's arguments from JavaScript's, in the order of its `visit`.
class ArgumentReader {
 public:
  ArgumentReader(const Napi::CallbackInfo& info, const std::shared_ptr<Stream>& stream)
      : info_(info), stream_(stream) {}

  void in(Tensor& t);
  void in(std::vector<Tensor>& list);
  void optionalIn(Tensor& t);
  void out(Tensor& t) { in(t); }
  void optionalOut(Tensor& t) { optionalIn(t); }
  void accumulate(Tensor& t) { in(t); }
  void optionalAccumulate(Tensor& t) { optionalIn(t); }
  void update(Tensor& t) { in(t); }
  void update(std::vector<Tensor>& list) { in(list); }
  void state(std::vector<Tensor>& list) { in(list); }
  void value(float& x) { x = static_cast<float>(number()); }
  void value(double& x) { x = number(); }
  void value(int64_t& x) { x = static_cast<int64_t>(number()); }
  void value(int& x) { x = static_cast<int>(number()); }
  void value(uint64_t& x) { x = static_cast<uint64_t>(number()); }
  void finish() const;

 private:
  Napi::Value next();
  double number();
  Tensor tensorOf(const Napi::Value& value) const;

  const Napi::CallbackInfo& info_;
  const std::shared_ptr<Stream>& stream_;
  size_t at_ = 1;  // argument 0 is the stream
};

void defineTensors(Napi::Env env, Napi::Object exports);
void defineFiles(Napi::Env env, Napi::Object exports);
void definePageFiles(Napi::Env env, Napi::Object exports);

}  // namespace qlora
