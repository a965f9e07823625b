#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#define FASTLOSS_UCONTEXT
#endif
#ifdef FASTLOSS_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef FASTLOSS_UNDER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace fastloss::emulator {

namespace {

constexpr size_t kGuard = 4096, kStack = 128 * 1024;

Fiber* running = nullptr;
struct Caller {  // whoever resumed the running fiber
  void* context = nullptr;
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
} caller;

}  // namespace

// ------------------------------------------------------------------------------------------- the switch of stacks

#ifdef FASTLOSS_UCONTEXT
namespace {
ucontext_t caller_context;
void switch_stacks(void** save, void* load) {
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void* new_context(void* reuse, unsigned char* stack, void (*entry)()) {
  auto* context = reuse ? static_cast<ucontext_t*>(reuse) : new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
void delete_context(void* context) { delete static_cast<ucontext_t*>(context); }
}  // namespace
#else
// Pushes what a call preserves, exchanges the stacks, pops. Several times as fast as swapcontext, which makes a system
// call. A new stack looks as if it had called this from `entry`.
extern "C" void fastloss_switch_stacks(void** save, void* load);
asm(R"(
.text
.type fastloss_switch_stacks, @function
fastloss_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastloss_switch_stacks, .-fastloss_switch_stacks
)");
namespace {
void switch_stacks(void** save, void* load) { fastloss_switch_stacks(save, load); }
void* new_context(void*, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStack);  // 16-byte aligned
  *--top = 0;  // the return address of `entry`, which does not return; 16-byte boundary less 8, as after a call
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers
  return top;
}
void delete_context(void*) {}
}  // namespace
#endif

// ------------------------------------------------------------------------------------------------------ fibers

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);  // an overflow faults
  stack_ = static_cast<unsigned char*>(memory) + kGuard;
}

Fiber::~Fiber() {
  delete_context(context_);
  munmap(stack_ - kGuard, kGuard + kStack);
#ifdef FASTLOSS_UNDER_TSAN
  if (tsan_) __tsan_destroy_fiber(tsan_);
#endif
}

void Fiber::start(Body body, void* argument) {
  body_ = body;
  argument_ = argument;
  fake_stack_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, kStack);  // an abandoned call left its frames poisoned
#endif
#ifdef FASTLOSS_UNDER_TSAN
  if (!tsan_) tsan_ = __tsan_create_fiber(0);  // kept: creating one takes a millisecond
#endif
  context_ = new_context(context_, stack_, &Fiber::enter);
}

void Fiber::resume() {
  running = this;
#ifdef FASTLOSS_UCONTEXT
  caller.context = &caller_context;
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&caller.fake_stack, stack_, kStack);
#endif
#ifdef FASTLOSS_UNDER_TSAN
  caller.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(&caller.context, context_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(caller.fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::pause() {
  Fiber* self = running;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&self->fake_stack_, caller.stack, caller.size);
#endif
#ifdef FASTLOSS_UNDER_TSAN
  __tsan_switch_to_fiber(caller.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stacks(&self->context_, caller.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->fake_stack_, &caller.stack, &caller.size);
#endif
}

void Fiber::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &caller.stack, &caller.size);
#endif
  running->body_(running->argument_);
  std::abort();
}

}  // namespace fastloss::emulator
