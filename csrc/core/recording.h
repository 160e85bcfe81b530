// Operations that were enqueued once, to be run in the same order, on the same tensors, as often as one likes. What they
// wrote on the way stays allocated.
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"
#include "core/error.h"
#include "core/scratch.h"

namespace qlora {

struct Context;

/// A kernel with its arguments.
class Operation {
 public:
  virtual ~Operation() = default;

  // On the stream's thread; none of them throws but prepare(), where there is no memory.

  /// Once or, of a recording, often. Its outputs have what went wrong.
  virtual void run(Context& context) = 0;
  /// The same, but what went wrong is returned, and the outputs do not have it.
  virtual std::shared_ptr<const Error> start(Context& context) = 0;
  /// What run() does before its kernel: its outputs are allocated, and nothing is wrong with them any more.
  virtual void prepare() = 0;
  /// Whether there is an error in what it reads or writes.
  virtual bool hasError() = 0;
  /// Gives its outputs an error.
  virtual void fail(const std::shared_ptr<const Error>& error) = 0;
};

struct Recording {
  explicit Recording(std::shared_ptr<Memory> memory) : scratch(std::move(memory)) {}

  std::vector<std::shared_ptr<Operation>> operations;

  /// Lets go of everything: the stream is closed.
  void clear() {
    graph.reset();
    operations.clear();
    scratch.clear();
  }

  /// On a device the first run allocates, the second makes a graph of the kernels, and the others launch it. There is
  /// none where an operation has to look at the device's memory before it can go on.
  enum class Stage { fresh, allocated, graph, noGraph } stage = Stage::fresh;
  ScratchStore scratch;
  std::unique_ptr<DeviceGraph> graph;  // goes before its scratch
};

}  // namespace qlora
