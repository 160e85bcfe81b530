// Threads that give way only when they say so, each with a stack of its own.
#pragma once

#include <cstddef>

namespace qlora::emulated {

constexpr size_t kFiberStack = 128 << 10;

/// A point of execution to go back to.
struct Fiber {
  void* stackPointer = nullptr;
};

/// Makes `fiber` begin at entry(), which may never return, on the stack of kFiberStack bytes that ends at `top`.
void prepare(Fiber& fiber, char* top, void (*entry)());
/// Leaves `from`, goes on with `to`.
void switchTo(Fiber& from, Fiber& to);

}  // namespace qlora::emulated
