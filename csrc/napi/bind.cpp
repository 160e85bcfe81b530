#include "napi/bind.h"

namespace qlora {

Napi::Error toJavaScript(Napi::Env env, const Error& error) {
  Napi::Error e = Napi::Error::New(env, error.what());
  e.Set("code", error.code);
  if (!error.hint.empty()) e.Set("hint", error.hint);
  return e;
}

// Called on the environment's thread; with no env when the environment is already going.
void Completions::deliverPending(napi_env rawEnv, napi_value, void*, void* data) {
  const std::unique_ptr<Delivery> delivery(static_cast<Delivery*>(data));
  if (!rawEnv) return;
  const Napi::Env env(rawEnv);
  Napi::HandleScope scope(env);
  auto& [owner, done] = *delivery;
  if (--owner->waiting_ == 0) napi_unref_threadsafe_function(env, owner->function_);
  try {
    if (done->error) {
      done->deferred.Reject(toJavaScript(env, *done->error).Value());
    } else {
      done->deferred.Resolve(done->value(env));
    }
  } catch (...) {
    // The result could not be made, or the worker is being terminated and nobody waits for it any more.
    try {
      done->deferred.Reject(toJavaScript(env, *currentError()).Value());
    } catch (const Napi::Error&) {
    }
  }
}

Completions::Completions(Napi::Env env) {
  napi_value name = Napi::String::New(env, "qlora-node");
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, nullptr, deliverPending,
                                  &function_);
  napi_unref_threadsafe_function(env, function_);
}

Napi::Promise Completions::add(Napi::Env env, std::shared_ptr<Stream> stream, Value value,
                               std::shared_ptr<Settle>& settle) {
  const auto deferred = Napi::Promise::Deferred::New(env);
  settle = std::make_shared<Settle>(shared_from_this(), std::make_unique<Completion>(Completion{
                                                            deferred, std::move(value), std::move(stream), nullptr}));
  // A pending promise keeps the event loop alive; an idle addon does not.
  if (waiting_++ == 0) napi_ref_threadsafe_function(env, function_);
  return deferred.Promise();
}

Completions::Settle::~Settle() {
  if (!completion_) return;
  (*this)(std::make_shared<Error>("ERR_QLORA_DISPOSED", "this model or stream was disposed of before it came to this"));
}

void Completions::Settle::operator()(std::shared_ptr<const Error> error) {
  completion_->error = std::move(error);
  completions_->deliver(std::move(completion_));
}

void Completions::deliver(std::unique_ptr<Completion> completion) {
  auto delivery = std::make_unique<Delivery>(Delivery{shared_from_this(), std::move(completion)});
  std::lock_guard lock(mutex_);
  if (function_ && napi_call_threadsafe_function(function_, delivery.get(), napi_tsfn_nonblocking) == napi_ok) {
    delivery.release();
  }
}

void Completions::shutDown() {
  std::lock_guard lock(mutex_);
  if (function_) napi_release_threadsafe_function(function_, napi_tsfn_abort);
  function_ = nullptr;
}

Napi::Promise onStream(Napi::Env env, const std::shared_ptr<Stream>& stream, std::function<void(Context&)> task,
                       Completions::Value value) {
  if (stream->recording()) fail("ERR_QLORA_INTERNAL", "only operations can be recorded, no reads and writes");
  std::shared_ptr<Completions::Settle> settle;
  const auto& completions = env.GetInstanceData<AddonData>()->completions;
  Napi::Promise promise = completions->add(env, stream, std::move(value), settle);
  try {
    stream->post([task = std::move(task), settle](Context& context) {
      std::shared_ptr<const Error> error;
      try {
        task(context);
      } catch (...) {
        error = currentError();
      }
      (*settle)(std::move(error));
    });
  } catch (...) {
    (*settle)(currentError());
  }
  return promise;
}

Napi::Value ArgumentReader::next() {
  if (at_ >= info_.Length())
    fail("ERR_QLORA_ARGUMENT", "an operation was given too few arguments (%zu)", info_.Length());
  return info_[at_++];
}

void ArgumentReader::finish() const {
  if (at_ != info_.Length()) {
    fail("ERR_QLORA_ARGUMENT", "an operation takes %zu arguments, got %zu", at_, info_.Length());
  }
}

double ArgumentReader::number() {
  const Napi::Value value = next();
  if (!value.IsNumber()) fail("ERR_QLORA_ARGUMENT", "argument %zu of an operation must be a number", at_ - 1);
  return value.As<Napi::Number>().DoubleValue();
}

Tensor ArgumentReader::tensorOf(const Napi::Value& value) const {
  const TensorHandle& handle = TensorHandle::of(value);
  if (handle.stream() != stream_) {
    fail("ERR_QLORA_ARGUMENT", "argument %zu of an operation belongs to another model's stream", at_ - 1);
  }
  return handle.tensor();
}

void ArgumentReader::in(Tensor& t) { t = tensorOf(next()); }

void ArgumentReader::optionalIn(Tensor& t) {
  const Napi::Value value = next();
  if (!value.IsUndefined() && !value.IsNull()) t = tensorOf(value);
}

void ArgumentReader::in(std::vector<Tensor>& list) {
  const Napi::Value value = next();
  if (!value.IsArray()) fail("ERR_QLORA_ARGUMENT", "argument %zu of an operation must be an array of tensors", at_ - 1);
  const Napi::Array array = value.As<Napi::Array>();
  list.reserve(array.Length());
  for (uint32_t i = 0; i < array.Length(); ++i) list.push_back(tensorOf(array[i]));
}

}  // namespace qlora
