// How an operation's arguments are described, and what happens around its kernel.
//
// An argument struct lists its members once, in `visit`, with the part that each plays:
//
//   in          read                                    a failed input fails the operation
//   out         allocated before the kernel, overwritten     fails with the operation
//   accumulate  added to (gradients of parameters)      fails with the operation
//   update      changed in place (parameters, counters)     untouched when the operation fails
//   state       changed in place (optimizer state); its bytes may be in a file (core/page_file.h)
//   value       a number
//
// `optional...` may be left out (an undefined tensor). From this one list come the reading of JavaScript's arguments,
// the allocation of outputs and the passing on of errors, so that a kernel is left with its arithmetic.
#pragma once

#include <chrono>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace qlora {

namespace detail {

struct FindError {
  std::shared_ptr<const Error> error;

  void in(const Tensor& t) {
    if (!error && t.defined()) error = t.storage->error;
    if (error || !t.defined() || t.size() == 0) return;
    if (t.storage->isElsewhere()) {
      error = std::make_shared<Error>("ERR_QLORA_INTERNAL", "an operation reads a tensor that is not on the device");
    } else if (!t.storage->data) {
      error = std::make_shared<Error>("ERR_QLORA_INTERNAL", "an operation reads a tensor that nothing has written");
    }
  }
  void in(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) in(t);
  }
  void optionalIn(const Tensor& t) { in(t); }
  void out(const Tensor&) {}
  void optionalOut(const Tensor&) {}
  void accumulate(const Tensor& t) {
    in(t);
    if (!error && t.defined() && t.storage->where != Storage::Where::here) {
      error = std::make_shared<Error>("ERR_QLORA_INTERNAL", "an operation changes a tensor that is on its way");
    }
  }
  void optionalAccumulate(const Tensor& t) { accumulate(t); }
  void update(const Tensor& t) { accumulate(t); }
  void update(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) accumulate(t);
  }
  void state(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) {
      if (!t.storage->pages) {
        in(t);
      } else if (!error) {
        error = t.storage->error;
      }
    }
  }
  template <class T>
  void value(const T&) {}
};

/// Of what is overwritten: an error that it has from before.
struct FindOutputError {
  bool found = false;

  void in(const Tensor&) {}
  void in(const std::vector<Tensor>&) {}
  void optionalIn(const Tensor&) {}
  void out(const Tensor& t) { found = found || t.storage->error; }
  void optionalOut(const Tensor& t) {
    if (t.defined()) out(t);
  }
  void accumulate(const Tensor&) {}
  void optionalAccumulate(const Tensor&) {}
  template <class T>
  void update(const T&) {}
  void state(const std::vector<Tensor>&) {}
  template <class T>
  void value(const T&) {}
};

struct AllocateOutputs {
  void in(const Tensor&) {}
  void in(const std::vector<Tensor>&) {}
  void optionalIn(const Tensor&) {}
  void out(const Tensor& t) {
    t.storage->allocate();
    t.storage->error = nullptr;  // of what is overwritten now
    t.storage->hostCopy = nullptr;
  }
  void optionalOut(const Tensor& t) {
    if (t.defined()) out(t);
  }
  void accumulate(const Tensor&) {}
  void optionalAccumulate(const Tensor&) {}
  void update(const Tensor& t) { t.storage->hostCopy = nullptr; }
  void update(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) update(t);
  }
  void state(const std::vector<Tensor>&) {}
  template <class T>
  void value(const T&) {}
};

struct PassOnError {
  std::shared_ptr<const Error> error;

  void in(const Tensor&) {}
  void in(const std::vector<Tensor>&) {}
  void optionalIn(const Tensor&) {}
  void out(const Tensor& t) { t.storage->error = error; }
  void optionalOut(const Tensor& t) { accumulate(t); }
  void accumulate(const Tensor& t) {
    if (t.defined()) t.storage->error = error;
  }
  void optionalAccumulate(const Tensor& t) { accumulate(t); }
  template <class T>
  void update(const T&) {}
  void state(const std::vector<Tensor>&) {}
  template <class T>
  void value(const T&) {}
};

}  // namespace detail

/// The exception in flight as an Error that can be kept. Call within a catch.
inline std::shared_ptr<const Error> currentError() {
  try {
    throw;
  } catch (const Error& e) {
    return std::make_shared<Error>(e);
  } catch (const std::bad_alloc&) {
    return std::make_shared<Error>("ERR_QLORA_OUT_OF_MEMORY", "out of memory");
  } catch (const std::exception& e) {
    return std::make_shared<Error>("ERR_QLORA_INTERNAL", e.what());
  }
}

template <class Args>
class OperationOf : public Operation {
 public:
  using Kernel = void (*)(Context&, const Args&);

  OperationOf(Stream& stream, Args args, Kernel kernel, std::string_view name)
      : stream_(stream), args_(std::move(args)), kernel_(kernel), name_(name) {}

  void run(Context& context) override {
    const auto began = std::chrono::steady_clock::now();
    if (const auto error = start(context)) fail(error);
    OperationTime& time = stream_.times()[name_];
    ++time.calls;
    time.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }

  std::shared_ptr<const Error> start(Context& context) override {
    detail::FindError inputs;
    args_.visit(inputs);
    if (inputs.error) return inputs.error;
    try {
      prepare();
      kernel_(context, args_);
    } catch (...) {
      return currentError();
    }
    return nullptr;
  }

  void prepare() override {
    detail::AllocateOutputs outputs;
    args_.visit(outputs);
  }

  bool hasError() override {
    detail::FindError inputs;
    args_.visit(inputs);
    detail::FindOutputError outputs;
    args_.visit(outputs);
    return inputs.error || outputs.found;
  }

  void fail(const std::shared_ptr<const Error>& error) override {
    detail::PassOnError passOn{error};
    args_.visit(passOn);
  }

 private:
  Stream& stream_;
  Args args_;
  const Kernel kernel_;
  const std::string_view name_;
};

/// Checks the arguments now; runs the kernel when the stream comes to it, and counts its time under `name`, a literal.
template <class Args>
void enqueue(Stream& stream, Args args, void (*kernel)(Context&, const Args&), std::string_view name) {
  args.check();
  stream.postOperation(std::make_shared<OperationOf<Args>>(stream, std::move(args), kernel, name));
}

}  // namespace qlora
