#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "core/check.h"
#include "core/offload.h"
#include "core/page_file.h"
#include "napi/bind.h"

namespace qlora {

namespace {

// Up to here a write copies at once; above, it reads the caller's array when the stream comes to it.
constexpr size_t kCopyAtOnce = size_t{1} << 20;

/// What JavaScript names by its number, one of `count`.
int readIndex(const Napi::Value& value, size_t count, const char* what) {
  const double i = value.ToNumber().DoubleValue();
  if (i >= 0 && i < static_cast<double>(count)) return static_cast<int>(i);
  fail("ERR_QLORA_ARGUMENT", "there is no %s %g", what, i);
}

/// By JavaScript's constructor, which throws where there is no memory; Node-API's own function would end the process.
Napi::ArrayBuffer arrayBuffer(Napi::Env env, size_t bytes) {
  try {
    const auto constructor = env.Global().Get("ArrayBuffer").As<Napi::Function>();
    return constructor.New({Napi::Number::New(env, static_cast<double>(bytes))}).As<Napi::ArrayBuffer>();
  } catch (const Napi::Error&) {
    throw Error("ERR_QLORA_OUT_OF_MEMORY",
                "out of memory: an array of " + std::to_string(bytes) + " bytes cannot be made in JavaScript",
                "Read a smaller tensor.");
  }
}

Napi::Value typedArray(Napi::Env env, DType dtype, size_t count, Napi::ArrayBuffer buffer) {
  switch (dtype) {
    case DType::f32:
      return Napi::Float32Array::New(env, count, buffer, 0);
    case DType::i32:
      return Napi::Int32Array::New(env, count, buffer, 0);
    case DType::u8:
      return Napi::Uint8Array::New(env, count, buffer, 0);
    case DType::i8:
      return Napi::Int8Array::New(env, count, buffer, 0);
    default:
      return Napi::Uint16Array::New(env, count, buffer, 0);
  }
}

}  // namespace

void readShape(const Napi::CallbackInfo& info, size_t first, Tensor& t) {
  const size_t rank = info.Length() - std::min(first, info.Length());
  if (rank > kMaxRank) fail("ERR_QLORA_SHAPE", "a shape has at most %d dimensions", kMaxRank);
  t.shape = {};
  t.rank = static_cast<int>(rank);
  double size = 1;
  for (size_t i = 0; i < rank; ++i) {
    const double n = info[first + i].ToNumber().DoubleValue();
    size *= n;
    if (!(n >= 0) || n != static_cast<double>(static_cast<int64_t>(n)) || size > 0x1p48) {
      fail("ERR_QLORA_SHAPE", "a shape must hold non-negative integers with a product below 2^48");
    }
    t.shape[i] = static_cast<int64_t>(n);
  }
}

DType readDType(const Napi::Value& value) {
  return static_cast<DType>(readIndex(value, std::size(kDTypeNames), "dtype"));
}

TensorHandle& TensorHandle::of(const Napi::Value& value) {
  void* handle = nullptr;
  if (napi_get_value_external(value.Env(), value, &handle) != napi_ok) {
    fail("ERR_QLORA_ARGUMENT", "expected a tensor");
  }
  return *static_cast<TensorHandle*>(handle);
}

Napi::Value TensorHandle::make(const Napi::Value& spare, std::shared_ptr<Stream> stream, Tensor tensor,
                               int64_t toldBytes) {
  const Napi::Env env = spare.Env();
  Napi::Value value = spare;
  if (spare.IsUndefined()) {
    value = Napi::External<TensorHandle>::New(env, new TensorHandle, [](Napi::Env env, TensorHandle* handle) {
      handle->dispose(env);
      delete handle;
    });
  }
  TensorHandle& handle = of(value);
  if (handle.tensor_.defined()) fail("ERR_QLORA_INTERNAL", "the handle of a tensor was given to another");
  handle.stream_ = std::move(stream);
  handle.tensor_ = std::move(tensor);
  handle.toldBytes_ = toldBytes;
  if (toldBytes) Napi::MemoryManagement::AdjustExternalMemory(env, toldBytes);
  return value;
}

const Tensor& TensorHandle::tensor() const {
  if (!tensor_.defined()) fail("ERR_QLORA_DISPOSED", "this tensor was disposed of");
  return tensor_;
}

void TensorHandle::dispose(Napi::Env env) {
  if (!tensor_.defined()) return;
  if (toldBytes_) Napi::MemoryManagement::AdjustExternalMemory(env, -toldBytes_);
  // Dropped in the stream's order, so that what is in memory when does not depend on how far JavaScript runs ahead.
  try {
    stream_->post([storage = std::move(tensor_.storage)](Context&) {});
  } catch (const Error&) {
    // The stream is closed: nothing uses the storage any more, and it goes with this handle.
  }
  tensor_ = {};
}

namespace {

/// make(spare, stream, dtype, memoryClass, ...shape): a tensor that nothing has written; see TensorHandle::make.
Napi::Value makeTensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const std::shared_ptr<Stream>& stream = StreamHandle::of(info[1]).stream;
    Tensor t;
    t.dtype = readDType(info[2]);
    readShape(info, 4, t);
    const auto memoryClass = static_cast<MemoryClass>(readIndex(info[3], kMemoryClasses, "memory class"));
    const size_t bytes = static_cast<size_t>(t.size()) * sizeOf(t.dtype);
    t.storage = std::make_shared<Storage>(stream->sharedMemory(), bytes, memoryClass);
    // Activations come and go with a step: told of them, V8 would collect all of its heap several times in each.
    const bool lasts = memoryClass != MemoryClass::activations && memoryClass != MemoryClass::scratch;
    const bool told = lasts && stream->memory().backing() == Backing::pages;
    return TensorHandle::make(info[0], stream, std::move(t), told ? static_cast<int64_t>(bytes) : 0);
  });
}

/// view(spare, tensor, ...shape): the same storage in another shape of the same size.
Napi::Value viewTensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const TensorHandle& source = TensorHandle::of(info[1]);
    Tensor viewed = source.tensor();
    readShape(info, 2, viewed);
    if (viewed.size() != source.tensor().size()) {
      fail("ERR_QLORA_SHAPE", "view: %s has another size than %s", shapeText(viewed).c_str(),
           shapeText(source.tensor()).c_str());
    }
    return TensorHandle::make(info[0], source.stream(), std::move(viewed));
  });
}

/// write(tensor, typedArray): Promise. Bytes are taken as they are.
Napi::Value writeTensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const TensorHandle& handle = TensorHandle::of(info[0]);
    const Tensor target = handle.tensor();
    if (!info[1].IsTypedArray()) fail("ERR_QLORA_ARGUMENT", "write takes a typed array");
    const Napi::TypedArray source = info[1].As<Napi::TypedArray>();
    const size_t bytes = source.ByteLength();
    if (bytes != target.storage->bytes) {
      fail("ERR_QLORA_SHAPE", "write: a tensor of shape %s and type %s holds %zu bytes, got %zu",
           shapeText(target).c_str(), name(target.dtype), target.storage->bytes, bytes);
    }
    const auto* data = static_cast<const char*>(source.ArrayBuffer().Data()) + source.ByteOffset();
    std::shared_ptr<std::vector<char>> copy;
    std::shared_ptr<Napi::ObjectReference> keep;
    if (bytes <= kCopyAtOnce) {
      copy = std::make_shared<std::vector<char>>(data, data + bytes);
      data = copy->data();
    } else {
      keep = std::make_shared<Napi::ObjectReference>(Napi::Persistent(source.As<Napi::Object>()));
    }
    return onStream(
        info.Env(), handle.stream(),
        [target, data, bytes, copy](Context& context) {
          try {
            if (!target.storage->pages) target.storage->allocate();
            target.storage->error = nullptr;
            if (target.storage->pages) {
              target.storage->pages->write(data, bytes, target.storage->pageOffset);
            } else if (context.queue) {
              context.queue->write(target.storage->data, data, bytes);
              target.storage->hostCopy = target.dtype == DType::i32 ? copy : nullptr;
            } else if (bytes) {
              std::memcpy(target.storage->data, data, bytes);
            }
          } catch (...) {
            target.storage->error = currentError();
            throw;
          }
        },
        [keep](Napi::Env env) { return env.Undefined(); });
  });
}

/// read(tensor): Promise of a typed array; 16-bit floats come as Uint16Array of their bits.
Napi::Value readTensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const TensorHandle& handle = TensorHandle::of(info[0]);
    const Tensor source = handle.tensor();
    const size_t bytes = source.storage->bytes;
    Napi::ArrayBuffer buffer = arrayBuffer(info.Env(), bytes);
    void* target = buffer.Data();
    auto keep = std::make_shared<Napi::Reference<Napi::ArrayBuffer>>(Napi::Persistent(buffer));
    const size_t count = static_cast<size_t>(source.size());
    return onStream(
        info.Env(), handle.stream(),
        [source, target, bytes](Context& context) {
          if (source.storage->error) throw Error(*source.storage->error);
          if (source.storage->pages) return source.storage->pages->read(target, bytes, source.storage->pageOffset);
          if (source.storage->isElsewhere()) fail("ERR_QLORA_INTERNAL", "read: the tensor is not on the device");
          if (!source.storage->data && bytes) fail("ERR_QLORA_INTERNAL", "read: nothing has written this tensor");
          if (context.queue) return context.queue->read(target, source.storage->data, bytes);
          if (bytes) std::memcpy(target, source.storage->data, bytes);
        },
        [keep, dtype = source.dtype, count](Napi::Env env) { return typedArray(env, dtype, count, keep->Value()); });
  });
}

/// Of a tensor of a device that computes now: a graph would repeat neither the memory that a move takes nor its copy.
void checkMove(const Stream& stream) {
  if (!stream.pinned()) fail("ERR_QLORA_INTERNAL", "only a device's tensors move to the host");
  if (stream.recording()) fail("ERR_QLORA_INTERNAL", "only operations can be recorded, no moves");
}

/// startMove(tensor, to): see core/offload.h; to: a place's number.
Napi::Value startTensorMove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const TensorHandle& handle = TensorHandle::of(info[0]);
    const auto to = static_cast<MemoryPlace>(readIndex(info[1], kMemoryPlaces, "place"));
    Stream& stream = *handle.stream();
    checkMove(stream);
    stream.post([storage = handle.tensor().storage, to, host = stream.pinned()](Context& context) {
      startMove(context, *storage, to, host);
    });
    return info.Env().Undefined();
  });
}

/// finishMove(tensor)
Napi::Value finishTensorMove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const TensorHandle& handle = TensorHandle::of(info[0]);
    checkMove(*handle.stream());
    handle.stream()->post([storage = handle.tensor().storage](Context& context) { finishMove(context, *storage); });
    return info.Env().Undefined();
  });
}

/// dispose(tensor): its handle may become another's.
Napi::Value disposeTensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    TensorHandle::of(info[0]).dispose(info.Env());
    return info.Env().Undefined();
  });
}

}  // namespace

void defineTensors(Napi::Env env, Napi::Object exports) {
  Napi::Object tensors = Napi::Object::New(env);
  tensors.Set("make", Napi::Function::New<makeTensor>(env, "make"));
  tensors.Set("view", Napi::Function::New<viewTensor>(env, "view"));
  tensors.Set("write", Napi::Function::New<writeTensor>(env, "write"));
  tensors.Set("read", Napi::Function::New<readTensor>(env, "read"));
  tensors.Set("startMove", Napi::Function::New<startTensorMove>(env, "startMove"));
  tensors.Set("finishMove", Napi::Function::New<finishTensorMove>(env, "finishMove"));
  tensors.Set("dispose", Napi::Function::New<disposeTensor>(env, "dispose"));
  exports.Set("tensors", tensors);
}

}  // namespace qlora
