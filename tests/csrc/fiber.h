// Functions that run in turns, each on a stack of its own: x86-64, one OS thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#if !defined(__x86_64__)
#error "the SIMT emulator switches stacks in x86-64 assembly"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 64 << 10;

// Leaves the callee-saved registers on this stack and its pointer in *save, and goes on where the
// other stack was left.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*other*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

// AddressSanitizer has to know on which stack the program is.
#if defined(__SANITIZE_ADDRESS__)
inline void before_switch(void** fake_stack, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
}
inline void after_switch(void* fake_stack, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
}
inline void forget_frames(void* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
inline void forget_frames(void*) {}
#endif

class Fiber {
 public:
  // Makes the next resume() call `body`, whatever the fiber was doing.
  void restart(void (*body)()) {
    if (!stack_) stack_.reset(static_cast<char*>(std::aligned_alloc(64, kStackBytes)));
    forget_frames(stack_.get());
    body_ = body;
    auto top = reinterpret_cast<uintptr_t*>(stack_.get() + kStackBytes - 64);
    *--top = 0;
    *--top = reinterpret_cast<uintptr_t>(&Fiber::enter);
    for (int i = 0; i < 6; ++i) *--top = 0;
    pointer_ = top;
  }

  // Runs the fiber until it pauses or its body returns.
  void resume() {
    current_ = this;
    void* fake_stack = nullptr;
    before_switch(&fake_stack, stack_.get(), kStackBytes);
    switch_stack(&resumer_, pointer_);
    after_switch(fake_stack, nullptr, nullptr);
  }

  // Goes back to the caller of resume(); to be called on the fiber's own stack.
  void pause() {
    void* fake_stack = nullptr;
    leave(&fake_stack);
    after_switch(fake_stack, &resumer_bottom_, &resumer_size_);
  }

 private:
  struct Free {
    void operator()(char* stack) const { std::free(stack); }
  };

  static void enter() {
    Fiber* self = current_;
    after_switch(nullptr, &self->resumer_bottom_, &self->resumer_size_);
    self->body_();
    self->leave(nullptr);
    std::abort();
  }

  void leave(void** fake_stack) {
    before_switch(fake_stack, resumer_bottom_, resumer_size_);
    switch_stack(&pointer_, resumer_);
  }

  static inline Fiber* current_ = nullptr;
  std::unique_ptr<char, Free> stack_;
  void (*body_)() = nullptr;
  void* pointer_ = nullptr;
  void* resumer_ = nullptr;
  const void* resumer_bottom_ = nullptr;
  size_t resumer_size_ = 0;
};

}  // namespace simt
