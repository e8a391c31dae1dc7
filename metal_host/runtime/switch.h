// Leave one fiber for another: save the callee-saved registers on the stack, exchange stack pointers, restore.
#pragma once

void mh_switch(void** save, void* load);
void mh_trampoline(void);
void mh_fiber_main(void);

#if defined(__APPLE__)
#define MH_SYMBOL(name) "_" #name
#else
#define MH_SYMBOL(name) #name
#endif

#if defined(__x86_64__)
enum { MH_SAVED_WORDS = 6 };
__asm__(".text\n.globl " MH_SYMBOL(mh_switch) "\n" MH_SYMBOL(mh_switch) ":\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
        ".globl " MH_SYMBOL(mh_trampoline) "\n" MH_SYMBOL(mh_trampoline) ":\n"
        "  callq " MH_SYMBOL(mh_fiber_main) "\n  ud2\n");
#elif defined(__aarch64__)
enum { MH_SAVED_WORDS = 20 };
__asm__(".text\n.p2align 2\n.globl " MH_SYMBOL(mh_switch) "\n" MH_SYMBOL(mh_switch) ":\n"
        "  sub sp, sp, #160\n"
        "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
        "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
        "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
        "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
        "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
        "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
        "  add sp, sp, #160\n  ret\n"
        ".p2align 2\n.globl " MH_SYMBOL(mh_trampoline) "\n" MH_SYMBOL(mh_trampoline) ":\n"
        "  bl " MH_SYMBOL(mh_fiber_main) "\n  brk #1\n");
#else
#error "the runner knows x86-64 and AArch64"
#endif

// A stack on which mh_switch finds a first frame that returns into mh_trampoline.
static inline void* mh_prepare_stack(char* top) {
  uintptr_t aligned = (uintptr_t)top & ~(uintptr_t)15;
#if defined(__x86_64__)
  void** sp = (void**)aligned - 2;  // the trampoline must start with sp = 16 n
  *--sp = (void*)mh_trampoline;
  sp -= MH_SAVED_WORDS;
  for (int i = 0; i < MH_SAVED_WORDS; ++i) sp[i] = 0;
#else
  void** sp = (void**)aligned - MH_SAVED_WORDS;
  for (int i = 0; i < MH_SAVED_WORDS; ++i) sp[i] = 0;
  sp[11] = (void*)mh_trampoline;  // x30
#endif
  return sp;
}
