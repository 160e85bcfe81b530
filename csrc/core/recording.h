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

  /// On the stream's thread, once or, of a recording, often. Does not throw: its outputs have what went wrong.
  virtual void run(Context& context) = 0;
  /// What is wrong with its inputs at this moment.
  virtual std::shared_ptr<const Error> inputError() = 0;
};

struct Recording {
  explicit Recording(std::shared_ptr<Memory> memory) : scratch(std::move(memory)) {}

  /// Whether an operation would pass on an error of what it reads, rather than run.
  bool hasInputError() const {
    for (const auto& operation : operations) {
      if (operation->inputError()) return true;
    }
    return false;
  }

  std::vector<std::shared_ptr<Operation>> operations;

  /// On a device the first run allocates, the second makes a graph of the kernels, and the others launch it; none does
  /// where an operation has to look at the device's memory before it can go on.
  enum class Stage { new_, allocated, graph, noGraph } stage = Stage::new_;
  ScratchStore scratch;
  std::unique_ptr<DeviceGraph> graph;  // goes before its scratch
};

}  // namespace qlora
