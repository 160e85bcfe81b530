#include <cstring>
#include <string>

#include "core/check.h"
#include "core/offload.h"
#include "core/page_file.h"
#include "napi/bind.h"

namespace qlora {

namespace {

const napi_type_tag kTensorTag = {0x716c6f726174656e, 0x736f720000000001};
// Up to here a write copies at once; above, it reads the caller's array when the stream comes to it.
constexpr size_t kCopyAtOnce = size_t{1} << 20;

template <size_t N>
int indexOf(const char* const (&names)[N], const Napi::Value& value, const char* what) {
  const std::string text = value.ToString();
  for (size_t i = 0; i < N; ++i) {
    if (text == names[i]) return static_cast<int>(i);
  }
  fail("ERR_QLORA_ARGUMENT", "unknown %s '%s'", what, text.c_str());
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

void readShape(const Napi::Value& value, Tensor& t) {
  if (!value.IsArray()) fail("ERR_QLORA_ARGUMENT", "a shape must be an array");
  const Napi::Array array = value.As<Napi::Array>();
  if (array.Length() > kMaxRank) fail("ERR_QLORA_SHAPE", "a shape has at most %d dimensions", kMaxRank);
  t.shape = {};
  t.rank = static_cast<int>(array.Length());
  double size = 1;
  for (int i = 0; i < t.rank; ++i) {
    const double n = array.Get(static_cast<uint32_t>(i)).ToNumber().DoubleValue();
    size *= n;
    if (!(n >= 0) || n != static_cast<double>(static_cast<int64_t>(n)) || size > 0x1p48) {
      fail("ERR_QLORA_SHAPE", "a shape must hold non-negative integers with a product below 2^48");
    }
    t.shape[i] = static_cast<int64_t>(n);
  }
}

DType readDType(const Napi::Value& value) { return static_cast<DType>(indexOf(kDTypeNames, value, "dtype")); }

Napi::Function TensorHandle::define(Napi::Env env) {
  return DefineClass(
      env, "Tensor",
      {InstanceMethod<&TensorHandle::write>("write"), InstanceMethod<&TensorHandle::read>("read"),
       InstanceMethod<&TensorHandle::view>("view"), InstanceMethod<&TensorHandle::startMove>("startMove"),
       InstanceMethod<&TensorHandle::finishMove>("finishMove"), InstanceMethod<&TensorHandle::dispose>("dispose")});
}

/// new Tensor(stream, dtype, shape, memoryClass)
TensorHandle::TensorHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TensorHandle>(info) {
  guarded(info.Env(), [&]() -> Napi::Value {
    info.This().As<Napi::Object>().TypeTag(&kTensorTag);
    if (info.Length() == 0) return info.Env().Undefined();  // filled by view()
    stream = StreamHandle::of(info[0]).stream;
    tensor_.dtype = readDType(info[1]);
    readShape(info[2], tensor_);
    const auto memoryClass = static_cast<MemoryClass>(indexOf(kMemoryClassNames, info[3], "memory class"));
    const size_t bytes = static_cast<size_t>(tensor_.size()) * sizeOf(tensor_.dtype);
    tensor_.storage = std::make_shared<Storage>(stream->sharedMemory(), bytes, memoryClass);
    const bool lasts = memoryClass != MemoryClass::activations && memoryClass != MemoryClass::scratch;
    ownsBytes_ = lasts && stream->memory().backing() == Backing::pages;
    if (ownsBytes_) Napi::MemoryManagement::AdjustExternalMemory(info.Env(), static_cast<int64_t>(bytes));
    return info.Env().Undefined();
  });
}

TensorHandle::~TensorHandle() { release(); }

TensorHandle& TensorHandle::of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTensorTag)) {
    fail("ERR_QLORA_ARGUMENT", "expected a tensor");
  }
  return *Napi::ObjectWrap<TensorHandle>::Unwrap(value.As<Napi::Object>());
}

const Tensor& TensorHandle::tensor() const {
  if (!tensor_.defined()) fail("ERR_QLORA_DISPOSED", "this tensor was disposed of");
  return tensor_;
}

/// write(typedArray): Promise. Bytes are taken as they are.
Napi::Value TensorHandle::write(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Tensor target = tensor();
    if (!info[0].IsTypedArray()) fail("ERR_QLORA_ARGUMENT", "write takes a typed array");
    const Napi::TypedArray source = info[0].As<Napi::TypedArray>();
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
      keep = std::make_shared<Napi::ObjectReference>(Napi::Persistent(info[0].As<Napi::Object>()));
    }
    return onStream(
        info.Env(), stream,
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

/// read(): Promise of a typed array; 16-bit floats come as Uint16Array of their bits.
Napi::Value TensorHandle::read(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Tensor source = tensor();
    const size_t bytes = source.storage->bytes;
    Napi::ArrayBuffer buffer = arrayBuffer(info.Env(), bytes);
    void* target = buffer.Data();
    auto keep = std::make_shared<Napi::Reference<Napi::ArrayBuffer>>(Napi::Persistent(buffer));
    const size_t count = static_cast<size_t>(source.size());
    return onStream(
        info.Env(), stream,
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

/// view(shape): the same storage in another shape of the same size.
Napi::Value TensorHandle::view(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    Tensor viewed = tensor();
    readShape(info[0], viewed);
    if (viewed.size() != tensor().size()) {
      fail("ERR_QLORA_SHAPE", "view: %s has another size than %s", shapeText(viewed).c_str(),
           shapeText(tensor()).c_str());
    }
    return wrap(info.Env(), stream, std::move(viewed));
  });
}

namespace {

/// Of a tensor of a device that computes now: a graph would repeat neither the memory that a move takes nor its copy.
void checkMove(const Stream& stream) {
  if (!stream.pinned()) fail("ERR_QLORA_INTERNAL", "only a device's tensors move to the host");
  if (stream.recording()) fail("ERR_QLORA_INTERNAL", "only operations can be recorded, no moves");
}

}  // namespace

/// startMove(to): see core/offload.h; to: 'host' or 'device'.
Napi::Value TensorHandle::startMove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto to = static_cast<MemoryPlace>(indexOf(kMemoryPlaceNames, info[0], "place"));
    checkMove(*stream);
    stream->post([storage = tensor().storage, to, host = stream->pinned()](Context& context) {
      qlora::startMove(context, *storage, to, host);
    });
    return info.Env().Undefined();
  });
}

Napi::Value TensorHandle::finishMove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    checkMove(*stream);
    stream->post([storage = tensor().storage](Context& context) { qlora::finishMove(context, *storage); });
    return info.Env().Undefined();
  });
}

Napi::Object TensorHandle::wrap(Napi::Env env, std::shared_ptr<Stream> stream, Tensor tensor) {
  Napi::Object object = env.GetInstanceData<AddonData>()->tensorClass.New({});
  TensorHandle& handle = of(object);
  handle.stream = std::move(stream);
  handle.tensor_ = std::move(tensor);
  handle.ownsBytes_ = false;
  return object;
}

Napi::Value TensorHandle::dispose(const Napi::CallbackInfo& info) {
  release();
  return info.Env().Undefined();
}

void TensorHandle::release() {
  if (!tensor_.defined()) return;
  if (ownsBytes_) Napi::MemoryManagement::AdjustExternalMemory(Env(), -static_cast<int64_t>(tensor_.storage->bytes));
  // Dropped in the stream's order, so that what is in memory when does not depend on how far JavaScript runs ahead.
  try {
    stream->post([storage = std::move(tensor_.storage)](Context&) {});
  } catch (const Error&) {
    // The stream is closed: nothing uses the storage any more, and it goes with this handle.
  }
  tensor_ = {};
}

}  // namespace qlora
