#include "core/offload.h"

#include "core/operation.h"

namespace qlora {

namespace {

using Where = Storage::Where;

void leave(Context& context, Storage& storage, const std::shared_ptr<Memory>& host) {
  auto offloaded = std::make_shared<Offloaded>(host, storage.bytes, storage.memoryClass);
  if (context.queue) offloaded->copy = context.queue->beginRead(offloaded->data, storage.data, storage.bytes);
  storage.offloaded = std::move(offloaded);
  storage.where = Where::leaving;
}

void arrive(Context& context, Storage& storage) {
  storage.data = storage.memory->allocate(storage.bytes, storage.memoryClass);
  storage.where = Where::arriving;
  Offloaded& offloaded = *storage.offloaded;
  if (context.queue) offloaded.copy = context.queue->beginWrite(storage.data, offloaded.data, storage.bytes);
}

}  // namespace

void startMove(Context& context, Storage& storage, MemoryPlace to, const std::shared_ptr<Memory>& host) {
  if (storage.error || (!storage.data && storage.where == Where::here)) return;
  const Where from = to == MemoryPlace::host ? Where::here : Where::away;
  try {
    if (storage.where != from) fail("ERR_QLORA_INTERNAL", "a tensor is moved to where it is, or is on its way already");
    to == MemoryPlace::host ? leave(context, storage, host) : arrive(context, storage);
  } catch (...) {
    storage.error = currentError();
  }
}

void finishMove(Context& context, Storage& storage) {
  if (storage.where != Where::leaving && storage.where != Where::arriving) return;
  try {
    if (context.queue && storage.offloaded->copy) context.queue->await(std::move(storage.offloaded->copy));
  } catch (...) {
    storage.error = currentError();
    return;
  }
  if (storage.where == Where::leaving) {
    storage.memory->release(storage.data, storage.bytes, storage.memoryClass);
    storage.data = nullptr;
    storage.where = Where::away;
  } else {
    // Who gets it next fills it by a copy, and those are in order.
    storage.offloaded = nullptr;
    storage.where = Where::here;
  }
}

}  // namespace qlora
