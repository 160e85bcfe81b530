#include "napi/bind.h"

namespace qlora {

Napi::Error toJavaScript(Napi::Env env, const Error& error) {
  Napi::Error e = Napi::Error::New(env, error.what());
  e.Set("code", error.code);
  if (!error.hint.empty()) e.Set("hint", error.hint);
  return e;
}

// Delivered on the environment's thread. napi calls it with no env when the environment is already going.
static void deliverPending(napi_env env, napi_value, void*, void* data) {
  auto* deliver = static_cast<std::function<void(napi_env)>*>(data);
  (*deliver)(env);
  delete deliver;
}

Completions::Completions(Napi::Env env) {
  napi_value name = Napi::String::New(env, "qlora-node");
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, nullptr, deliverPending,
                                  &function_);
  napi_unref_threadsafe_function(env, function_);
}

Napi::Promise Completions::add(Napi::Env env, std::function<Napi::Value(Napi::Env)> value, Settle& settle) {
  auto deferred = std::make_shared<Napi::Promise::Deferred>(Napi::Promise::Deferred::New(env));
  auto result = std::make_shared<std::function<Napi::Value(Napi::Env)>>(std::move(value));
  // A pending promise keeps the event loop alive; an idle addon does not.
  if (waiting_++ == 0) napi_ref_threadsafe_function(env, function_);
  settle = [this, deferred, result](std::shared_ptr<const Error> error) {
    auto* deliver = new std::function<void(napi_env)>([this, deferred, result, error](napi_env rawEnv) {
      if (!rawEnv) return;
      Napi::Env env(rawEnv);
      Napi::HandleScope scope(env);
      if (--waiting_ == 0) napi_unref_threadsafe_function(env, function_);
      if (error) {
        deferred->Reject(toJavaScript(env, *error).Value());
      } else {
        deferred->Resolve((*result)(env));
      }
      *result = nullptr;  // what it kept alive belongs to this thread
    });
    std::lock_guard lock(mutex_);
    if (!function_ || napi_call_threadsafe_function(function_, deliver, napi_tsfn_nonblocking) != napi_ok) {
      delete deliver;
    }
  };
  return deferred->Promise();
}

void Completions::shutDown() {
  std::lock_guard lock(mutex_);
  if (function_) napi_release_threadsafe_function(function_, napi_tsfn_abort);
  function_ = nullptr;
}

Napi::Value ArgumentReader::next() {
  if (at_ >= info_.Length()) fail("ERR_QLORA_ARGUMENT", "an operation was given too few arguments (%zu)", info_.Length());
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
  if (handle.stream != stream_) {
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
