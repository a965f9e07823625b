// A fiber: a call with a stack of its own, entered and left by hand. The sanitizers are told of every switch.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_THREAD__) || defined(FASTLOSS_TSAN)  // the latter: this file itself is not instrumented
#define FASTLOSS_UNDER_TSAN 1
#endif

namespace fastloss::emulator {

class Fiber {
 public:
  using Body = void (*)(void* argument);

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Arms the fiber; an earlier call that has not returned is abandoned where it stands, without unwinding.
  void start(Body body, void* argument);
  void resume();        // runs the fiber until it pauses
  static void pause();  // back to whoever resumed the running fiber; a body ends with a pause, it never returns

 private:
  static void enter();

  unsigned char* stack_ = nullptr;
  void* context_ = nullptr;  // the stack pointer, or a ucontext_t
  Body body_ = nullptr;
  void* argument_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_ = nullptr;        // ThreadSanitizer's
};

}  // namespace fastloss::emulator
