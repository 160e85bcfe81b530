// Files of paged optimizer state as JavaScript sees them.
#include "core/page_file.h"

#include "core/check.h"
#include "napi/bind.h"

namespace qlora {

namespace {

/// new PageFile(stream, path, bytes, slotBytes), then `await open()`.
class PageFileHandle : public Napi::ObjectWrap<PageFileHandle> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "PageFile",
        {InstanceMethod<&PageFileHandle::open>("open"), InstanceMethod<&PageFileHandle::tensor>("tensor"),
         InstanceMethod<&PageFileHandle::close>("close")});
  }

  explicit PageFileHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<PageFileHandle>(info) {
    guarded(info.Env(), [&]() -> Napi::Value {
      stream_ = StreamHandle::of(info[0]).stream;
      path_ = info[1].ToString();
      bytes_ = static_cast<uint64_t>(info[2].ToNumber().Int64Value());
      slotBytes_ = static_cast<size_t>(info[3].ToNumber().Int64Value());
      return info.Env().Undefined();
    });
  }

 private:
  /// Reserving may take a while: it is done on the stream's thread.
  Napi::Value open(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      auto opened = std::make_shared<std::shared_ptr<PageFile>>();
      auto self = std::make_shared<Napi::ObjectReference>(Napi::Persistent(info.This().As<Napi::Object>()));
      return onStream(
          info.Env(), stream_,
          [opened, path = path_, bytes = bytes_, slotBytes = slotBytes_, memory = stream_->sharedMemory()](Context&) {
            *opened = std::make_shared<PageFile>(path, bytes, slotBytes, memory);
          },
          [this, self, opened](Napi::Env env) {
            file_ = std::move(*opened);
            return env.Undefined();
          });
    });
  }

  /// tensor(dtype, ...shape): one whose bytes are in the file, zeros at first.
  Napi::Value tensor(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      if (!file_) fail("ERR_QLORA_DISPOSED", "the file of paged state is not open");
      Tensor t;
      t.dtype = readDType(info[0]);
      readShape(info, 1, t);
      const size_t bytes = static_cast<size_t>(t.size()) * sizeOf(t.dtype);
      t.storage = std::make_shared<Storage>(stream_->sharedMemory(), bytes, MemoryClass::optimizer);
      t.storage->pages = file_;
      t.storage->pageOffset = file_->take(bytes);
      return TensorHandle::make(info.Env().Undefined(), stream_, std::move(t));
    });
  }

  /// It goes with the last of its tensors.
  Napi::Value close(const Napi::CallbackInfo& info) {
    file_ = nullptr;
    return info.Env().Undefined();
  }

  std::shared_ptr<Stream> stream_;
  std::string path_;
  uint64_t bytes_ = 0;
  size_t slotBytes_ = 0;
  std::shared_ptr<PageFile> file_;
};

}  // namespace

void definePageFiles(Napi::Env env, Napi::Object exports) { exports.Set("PageFile", PageFileHandle::define(env)); }

}  // namespace qlora
