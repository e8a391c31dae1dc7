// The last line: an access that the processor refuses ends the launch with a report, and the process goes on.
//
// The checks of shadow.c come first. They do not see what the compiler leaves out (a local array that nobody points to,
// a vector of 32 bytes), and the fast build has none.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#if defined(__APPLE__)
#define _XOPEN_SOURCE
#endif
#include <ucontext.h>

#include "runtime.h"

enum { STACK = 1 << 16 };
static const int signals[] = {SIGSEGV, SIGBUS};
static struct sigaction previous[2];
static char handler_stack[STACK] __attribute__((aligned(16)));
static char report_stack[STACK] __attribute__((aligned(16)));
static pthread_t launching;
static volatile bool guarded;
static uint64_t address, place;

static void report(void) {
  mh.atomic = mh.matrix = 0;
  struct mh_report* r = mh_new_report(MH_CRASH, place, 0);
  if (r) r->address = address;
  mh_abandon();
}

// Where the signal returns to: `report`, on a stack of its own.
static void divert(ucontext_t* context) {
  uint64_t top = (uint64_t)report_stack + STACK - 64;
#if defined(__APPLE__) && defined(__x86_64__)
  place = context->uc_mcontext->__ss.__rip;
  context->uc_mcontext->__ss.__rip = (uint64_t)report, context->uc_mcontext->__ss.__rsp = top - 8;
#elif defined(__APPLE__)
  place = context->uc_mcontext->__ss.__pc;
  context->uc_mcontext->__ss.__pc = (uint64_t)report, context->uc_mcontext->__ss.__sp = top;
#elif defined(__x86_64__)
  place = (uint64_t)context->uc_mcontext.gregs[REG_RIP];
  context->uc_mcontext.gregs[REG_RIP] = (long long)(uint64_t)report;
  context->uc_mcontext.gregs[REG_RSP] = (long long)(top - 8);
#else
  place = context->uc_mcontext.pc;
  context->uc_mcontext.pc = (uint64_t)report, context->uc_mcontext.sp = top;
#endif
}

static void handle(int signal, siginfo_t* information, void* context) {
  if (!guarded || !pthread_equal(pthread_self(), launching)) {  // not a kernel's: as if we were not here
    sigaction(signal, &previous[signal == signals[1]], 0);
    return;
  }
  address = (uint64_t)information->si_addr;
  divert(context);
}

int __mh_guarded_launch(struct mh_launch* launch) {
  stack_t stack = {.ss_sp = handler_stack, .ss_size = STACK}, previous_stack;
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  launching = pthread_self();
  sigaltstack(&stack, &previous_stack);
  for (int i = 0; i < 2; ++i) sigaction(signals[i], &action, &previous[i]);
  guarded = true;
  int result = __mh_launch(launch);
  guarded = false;
  for (int i = 0; i < 2; ++i) sigaction(signals[i], &previous[i], 0);
  sigaltstack(&previous_stack, 0);
  return result;
}
