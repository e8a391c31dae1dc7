// What a compiled kernel and the host may ask of the runtime, and what its files share.
//
// One operating-system thread runs a launch. Every Metal thread is a fiber; it leaves the processor only in an
// operation that needs others: a barrier, or a collective of its simdgroup (shuffle, vote, reduction, matrix product).
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MH_LANES 32
#define MH_QUAD 4
#define MH_MAX_THREADS 1024
#define MH_MAX_SIMDGROUPS (MH_MAX_THREADS / MH_LANES)
#define MH_MAX_BUFFERS 31
#define MH_MAX_REPORTS 64

void* memcpy(void*, const void*, size_t);
void* memmove(void*, const void*, size_t);
void* memset(void*, int, size_t);

// Collectives; ../instrumented.py knows the numbers.
enum mh_kind {
  MH_NONE,
  MH_SHUFFLE,
  MH_GATHER,
  MH_VOTE,
  MH_MATRIX,
  MH_SIMDGROUP_BARRIER,
  MH_THREADGROUP_BARRIER,
  MH_TENSOR,
};
enum { MH_MEM_DEVICE = 1, MH_MEM_THREADGROUP = 2 };

// One threadgroup variable of a kernel: written by the compiler into section mh_tg (include/msl/cpu.h).
struct mh_threadgroup_variable {
  uint64_t address, size, number, unused;
};

// What a thread brings to an operation on cooperative tensors (include/msl/cpu_tensor.h): of each operand its elements as
// words, floats or int32s, in the order of its slots.
enum mh_reduce { MH_PRODUCT, MH_SUM, MH_MAX, MH_MIN };
struct mh_layout;
struct mh_tensor_request {
  const struct mh_layout* layouts[3];  // left, right, destination; of a reduction: source, none, destination
  uint32_t* words[3];
  uint32_t reduce, accumulate, integer, identity;
};
// Where elements are (tensor.c): ../layouts.py.
enum { MH_LAYOUT_APPLE10, MH_LAYOUT_LEGACY, MH_LAYOUT_SEEDS };

// A range of memory that the launch may touch. Instrumented launches only.
enum mh_space { MH_DEVICE, MH_CONSTANT, MH_THREADGROUP, MH_STACK };
struct mh_region {
  uint64_t start, end;
  uint32_t space, id;  // id: buffer index, or the number of a threadgroup variable
  void* shadow;        // shadow.c
};

struct mh_counters {
  uint64_t device_bytes_read, device_bytes_written, constant_bytes_read, threadgroup_bytes_read,
      threadgroup_bytes_written;
  uint64_t threadgroup_barriers, simdgroup_barriers, matrix_products, shuffles, reductions, transcendentals, atomics;
  uint64_t switches;
};

enum mh_fault {
  MH_RACE = 1,
  MH_OUT_OF_BOUNDS,
  MH_UNINITIALISED,
  MH_DIVERGENT_BARRIER,
  MH_DIVERGENT_COLLECTIVE,
  MH_INACTIVE_LANE,
  MH_INDEX,
  MH_MISALIGNED,
  MH_CRASH,
  MH_SCOPE,
  MH_EXTENTS,
  MH_INCOMPATIBLE,
  MH_SLOT,
};
struct mh_report {
  uint32_t fault, kind;           // enum mh_fault; enum mh_kind where a collective is at fault
  uint32_t size, write;           // of the access; write of a barrier: with other flags
  uint32_t thread, other_thread;  // index in threadgroup; MH_MAX_THREADS and above: a simdgroup's matrix or tensor
  uint32_t group[3], other_write;
  uint64_t site, other_site;  // return addresses inside the kernel's image
  uint64_t address, mask;
  int64_t index;                 // MH_INDEX
  uint64_t source;               // MH_INDEX: struct ubsan_source_location*
  uint32_t region, near_region;  // index in regions, or ~0; the closest region of an access out of bounds
};

struct mh_launch {
  void (*entry)(void);
  uint64_t arguments[MH_MAX_BUFFERS], threadgroup_arguments[MH_MAX_BUFFERS];
  uint32_t grid[3], group[3];
  uint64_t seed;  // 0: lanes in order
  char* stacks;
  uint64_t stack_size;
  const struct mh_threadgroup_variable* variables;
  uint64_t variable_count;
  struct mh_region* regions;  // sorted by start; null in the fast build
  uint64_t region_count;
  char* shadow_memory;  // zeroed
  uint64_t shadow_size, shadow_used;
  const uint64_t* sites;  // sorted; the places in the source that they belong to are equal for equal lines
  const uint32_t* site_lines;
  uint64_t site_count;
  uint32_t allow_partial_collectives, lockstep, report_count, layout;
  struct mh_counters counters;
  struct mh_report reports[MH_MAX_REPORTS];
};

struct mh_fiber {
  void* stack_pointer;
  enum mh_kind waiting_in;
  uint32_t flags;  // of a barrier
  uint64_t site;
  const void* in;
  void* out;
  uint32_t size, source_lane;
};

struct mh_simdgroup {
  uint32_t exists, ready, in_collective, at_barrier;  // one bit a lane
  uint32_t round;                                     // in lockstep: lanes that have yet to take the current step
  uint32_t epoch[2];                                  // simdgroup barriers passed: device, threadgroup
};

// What the running fiber sees; kernels read lane and thread directly.
struct mh_self {
  uint32_t lane, thread;
};
extern struct mh_self __mh_self;

struct mh_state {
  struct mh_launch* launch;
  uint32_t group_position[3], group_size[3], group_count[3];
  uint32_t threads, simdgroups, live, at_barrier;
  uint32_t epoch[2];      // threadgroup barriers passed: device, threadgroup
  uint32_t group_serial;  // 1 for the first threadgroup of the launch
  uint64_t random;
  void* scheduler;  // stack pointer of the launching context
  bool abandoned;
  uint32_t atomic, matrix;  // the current access is an atomic's, or a simdgroup matrix's (1 load, 2 store) or a tensor's (3, 4)
  struct mh_fiber fibers[MH_MAX_THREADS];
  struct mh_simdgroup simdgroup[MH_MAX_SIMDGROUPS];
};
extern struct mh_state mh;

int __mh_launch(struct mh_launch* launch);

// scheduler.c
void mh_abandon(void) __attribute__((noreturn));  // end the launch from inside a fiber
void mh_step(uint64_t site);                      // in lockstep: let the other lanes come as far as this access

// collective.c
void mh_perform(struct mh_simdgroup* simdgroup, uint32_t base, uint32_t lanes);

// tensor.c
void mh_forget_layouts(void);
void mh_perform_tensor(uint32_t first, uint32_t count, uint32_t lanes);  // for threads [first, first + count)

// faults.c
struct mh_report* mh_new_report(enum mh_fault fault, uint64_t site, uint64_t other_site);
void mh_check_barrier(void);
void mh_check_scope(uint32_t threads, uint64_t site);
void mh_check_collective(struct mh_simdgroup* simdgroup, uint32_t base, uint32_t lanes);

// shadow.c
void mh_begin_threadgroup(void);
void mh_decide_writes(void);
