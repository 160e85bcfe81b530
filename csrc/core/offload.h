// Bytes that a device does not need for a while go to pinned memory of the host, beside what the stream computes, and
// come back. A move has a beginning and an end, and what the stream computes in between hides it:
//
//                         before    after
//   startMove(to host)    here      leaving     may be read on, not written
//   finishMove()          leaving   away        the device's memory is free
//   startMove(to device)  away      arriving    the device has memory for it again
//   finishMove()          arriving  here
//
// Neither waits: what is enqueued after finishMove() begins when the copy has ended. That is what makes it safe to free
// memory then, as everything that is given it again is enqueued later. On the stream's thread only. What goes wrong is
// kept in the storage, as operations keep it in their outputs. In a rehearsal memory is taken and nothing copied.
#pragma once

#include <memory>

#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

/// What a storage has of the host's memory.
struct Offloaded {
  Offloaded(std::shared_ptr<Memory> memory, size_t bytes, MemoryClass memoryClass)
      : memory(std::move(memory)),
        bytes(bytes),
        memoryClass(memoryClass),
        data(this->memory->allocate(bytes, memoryClass)) {}
  Offloaded(const Offloaded&) = delete;
  Offloaded& operator=(const Offloaded&) = delete;
  ~Offloaded() {
    copy.reset();  // which waits where nobody did
    memory->release(data, bytes, memoryClass);
  }

  const std::shared_ptr<Memory> memory;
  const size_t bytes;
  const MemoryClass memoryClass;
  void* const data;
  std::unique_ptr<DeviceCopy> copy;
};

/// `host` is the pinned memory of the storage's stream.
void startMove(Context& context, Storage& storage, MemoryPlace to, const std::shared_ptr<Memory>& host);
void finishMove(Context& context, Storage& storage);

}  // namespace qlora
