#include "cuda/emulated/fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qlora::emulated {

#if defined(__x86_64__)

// System V: what a call must preserve is rbx, rbp, r12 to r15 and the stack pointer.
extern "C" __attribute__((naked, noinline, visibility("hidden"))) void qloraSwitchFiber(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

void prepare(Fiber& fiber, char* top, void (*entry)()) {
  auto* stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--stack = nullptr;  // where entry would return to; aligned as at a call
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  fiber.stackPointer = stack;
}

void switchTo(Fiber& from, Fiber& to) { qloraSwitchFiber(&from.stackPointer, to.stackPointer); }

#else

// The stack pointer stands for a ucontext, which is made when first needed and kept.
static ucontext_t& contextOf(Fiber& fiber) {
  if (!fiber.stackPointer) fiber.stackPointer = new ucontext_t;
  return *static_cast<ucontext_t*>(fiber.stackPointer);
}

void prepare(Fiber& fiber, char* top, void (*entry)()) {
  ucontext_t& context = contextOf(fiber);
  getcontext(&context);
  context.uc_stack.ss_sp = top - kFiberStack;
  context.uc_stack.ss_size = kFiberStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void switchTo(Fiber& from, Fiber& to) { swapcontext(&contextOf(from), &contextOf(to)); }

#endif

}  // namespace qlora::emulated
