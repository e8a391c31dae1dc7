// Runs the threadgroups of a launch one after another, and the threads of one as fibers.
#include "runtime.h"
#include "switch.h"

struct mh_self __mh_self;
struct mh_state mh;

// Lockstep: all ready lanes at the earliest place in the code take one step, from memory access to memory access, before
// any takes the next. Lanes that left the others at a branch wait for them where the paths meet.
static uint32_t next_in_step(struct mh_simdgroup* sg, uint32_t base) {
  sg->round &= sg->ready;
  if (!sg->round) {
    uint64_t site = ~0ull;
    for (uint32_t rest = sg->ready; rest; rest &= rest - 1) {
      uint32_t lane = (uint32_t)__builtin_ctz(rest);
      uint64_t at = mh.fibers[base + lane].site;
      if (at < site) site = at, sg->round = 0;
      if (at == site) sg->round |= 1u << lane;
    }
  }
  uint32_t lane = (uint32_t)__builtin_ctz(sg->round);
  sg->round &= sg->round - 1;
  return lane;
}

static uint32_t pick(uint32_t candidates, uint32_t after) {
  if (mh.launch->seed) {  // xorshift64*: any ready lane, by the seed
    mh.random ^= mh.random >> 12, mh.random ^= mh.random << 25, mh.random ^= mh.random >> 27;
    uint32_t skip = (uint32_t)((mh.random * 0x2545F4914F6CDD1Dull) >> 40) % (uint32_t)__builtin_popcount(candidates);
    while (skip--) candidates &= candidates - 1;
    return (uint32_t)__builtin_ctz(candidates);
  }
  uint32_t later = after < 31 ? candidates & ~((2u << after) - 1) : 0;
  return (uint32_t)__builtin_ctz(later ? later : candidates);
}

// No lane of the simdgroup can run and some wait in collectives: those that wait at one place are the active lanes
// there. The earliest place in the code goes first, so that lanes which took the other branch catch up before paths
// meet again.
static void release_partial(struct mh_simdgroup* sg, uint32_t base) {
  uint64_t site = ~0ull;
  for (uint32_t rest = sg->in_collective; rest; rest &= rest - 1) {
    uint64_t at = mh.fibers[base + (uint32_t)__builtin_ctz(rest)].site;
    if (at < site) site = at;
  }
  uint32_t lanes = 0;
  for (uint32_t rest = sg->in_collective; rest; rest &= rest - 1) {
    uint32_t lane = (uint32_t)__builtin_ctz(rest);
    if (mh.fibers[base + lane].site == site) lanes |= 1u << lane;
  }
  if (mh.launch->regions) mh_check_collective(sg, base, lanes);
  mh_perform(sg, base, lanes);
}

static void release_barrier(void) {
  if (mh.launch->regions) mh_check_barrier();
  uint32_t flags = 0;
  for (uint32_t s = 0; s < mh.simdgroups; ++s) {
    struct mh_simdgroup* sg = &mh.simdgroup[s];
    if (sg->at_barrier) flags |= mh.fibers[s * MH_LANES + (uint32_t)__builtin_ctz(sg->at_barrier)].flags;
    sg->ready |= sg->at_barrier;
    sg->at_barrier = 0;
  }
  mh.at_barrier = 0;
  mh_perform_tensor(0, mh.threads, ~0u);
  mh.epoch[0] += (flags & MH_MEM_DEVICE) != 0;
  mh.epoch[1] += (flags & MH_MEM_THREADGROUP) != 0;
  mh.launch->counters.threadgroup_barriers++;
}

// The next thread to run, or -1 when all have ended.
static int next_thread(void) {
  uint32_t first = __mh_self.thread / MH_LANES;
  if (mh.launch->seed) {
    mh.random ^= mh.random >> 12, mh.random ^= mh.random << 25, mh.random ^= mh.random >> 27;
    first = (uint32_t)((mh.random * 0x2545F4914F6CDD1Dull) >> 40) % mh.simdgroups;
  }
  for (;;) {
    for (uint32_t i = 0; i < mh.simdgroups; ++i) {
      uint32_t s = (first + i) % mh.simdgroups;
      struct mh_simdgroup* sg = &mh.simdgroup[s];
      if (!sg->ready && sg->in_collective) release_partial(sg, s * MH_LANES);
      if (sg->ready && mh.launch->lockstep) return (int)(s * MH_LANES + next_in_step(sg, s * MH_LANES));
      if (sg->ready) return (int)(s * MH_LANES + pick(sg->ready, __mh_self.thread % MH_LANES));
    }
    if (!mh.live) return -1;
    release_barrier();
  }
}

static void run_next(void** save) {
  int thread = next_thread();
  if (thread < 0) {
    mh_switch(save, mh.scheduler);
    return;
  }
  uint32_t before = __mh_self.thread;
  __mh_self.thread = (uint32_t)thread;
  __mh_self.lane = (uint32_t)thread % MH_LANES;
  if (save == &mh.fibers[before].stack_pointer && before == (uint32_t)thread) return;
  mh.launch->counters.switches++;
  mh_switch(save, mh.fibers[thread].stack_pointer);
}

void mh_fiber_main(void) {
  mh.launch->entry();
  if (mh.launch->regions) mh_decide_writes();
  uint32_t thread = __mh_self.thread;
  mh.live--;
  mh.simdgroup[thread / MH_LANES].ready &= ~(1u << thread % MH_LANES);
  mh.fibers[thread].waiting_in = MH_NONE;
  void* unused;
  run_next(&unused);
  __builtin_trap();
}

void mh_abandon(void) {
  mh.abandoned = true;
  void* unused;
  mh_switch(&unused, mh.scheduler);
  __builtin_trap();
}

void mh_step(uint64_t site) {
  struct mh_fiber* fiber = &mh.fibers[__mh_self.thread];
  mh_decide_writes();
  uint32_t atomic = mh.atomic, matrix = mh.matrix;  // the running fiber's
  fiber->site = site;
  run_next(&fiber->stack_pointer);
  mh.atomic = atomic, mh.matrix = matrix;
}

static struct mh_fiber* park(enum mh_kind kind, uint64_t site) {
  if (mh.launch->regions) mh_decide_writes();
  struct mh_fiber* fiber = &mh.fibers[__mh_self.thread];
  fiber->waiting_in = kind;
  fiber->site = site;
  return fiber;
}

static void wait_for_threadgroup(enum mh_kind kind, uint64_t site, uint32_t flags, const void* in) {
  struct mh_fiber* fiber = park(kind, site);
  fiber->flags = flags, fiber->in = in;
  uint32_t thread = __mh_self.thread;
  struct mh_simdgroup* sg = &mh.simdgroup[thread / MH_LANES];
  sg->ready &= ~(1u << thread % MH_LANES);
  sg->at_barrier |= 1u << thread % MH_LANES;
  if (++mh.at_barrier == mh.live) release_barrier();
  run_next(&fiber->stack_pointer);
  fiber->waiting_in = MH_NONE;
}

void __mh_threadgroup_barrier(uint32_t flags) {
  wait_for_threadgroup(MH_THREADGROUP_BARRIER, (uint64_t)__builtin_return_address(0), flags, 0);
}

// Every lane of the simdgroup brings (in, size), and gets what the kind says in out (collective.c).
static void collective(enum mh_kind kind, uint64_t site, const void* in, void* out, uint32_t size,
                       uint32_t source_lane) {
  struct mh_fiber* fiber = park(kind, site);
  fiber->in = in, fiber->out = out, fiber->size = size, fiber->source_lane = source_lane;
  uint32_t thread = __mh_self.thread, base = thread & ~31u, bit = 1u << thread % MH_LANES;
  struct mh_simdgroup* sg = &mh.simdgroup[thread / MH_LANES];
  sg->ready &= ~bit;
  sg->in_collective |= bit;
  if (sg->in_collective == sg->exists) {
    bool same = true;
    for (uint32_t rest = sg->exists; rest; rest &= rest - 1)
      same &= mh.fibers[base + (uint32_t)__builtin_ctz(rest)].site == site;
    if (same) {
      mh_perform(sg, base, sg->exists);
      fiber->waiting_in = MH_NONE;
      if (!mh.launch->seed) return;
    }
  }
  run_next(&fiber->stack_pointer);
  fiber->waiting_in = MH_NONE;
}

#define SITE ((uint64_t)__builtin_return_address(0))
void __mh_shuffle(const void* in, void* out, uint32_t size, uint32_t lane) {
  collective(MH_SHUFFLE, SITE, in, out, size, lane);
}
uint32_t __mh_gather(const void* in, void* out, uint32_t size) {
  collective(MH_GATHER, SITE, in, out, size, 0);
  return mh.fibers[__mh_self.thread].source_lane;  // the lanes that took part
}
uint32_t __mh_vote(uint32_t value, uint32_t* active) {
  uint32_t ballot = 0;
  collective(MH_VOTE, SITE, &value, &ballot, sizeof value, 0);
  *active = mh.fibers[__mh_self.thread].source_lane;
  return ballot;
}
void __mh_matrix_product(const float* operands, float* result) {
  collective(MH_MATRIX, SITE, operands, result, 6 * sizeof(float), 0);
}
void __mh_simdgroup_barrier(uint32_t flags) {
  mh.fibers[__mh_self.thread].flags = flags;
  collective(MH_SIMDGROUP_BARRIER, SITE, 0, 0, 0, 0);
}
// `threads` of the operation's scope: this one, its simdgroup, or the threadgroup.
void __mh_tensor_operation(const struct mh_tensor_request* request, uint32_t threads) {
  if (mh.launch->regions) mh_check_scope(threads, SITE);
  if (threads == MH_LANES) {
    collective(MH_TENSOR, SITE, request, 0, 0, 0);
  } else if (threads > 1) {
    wait_for_threadgroup(MH_TENSOR, SITE, 0, request);
  } else {
    struct mh_fiber* fiber = park(MH_TENSOR, SITE);
    fiber->in = request;
    mh_perform_tensor(__mh_self.thread, 1, ~0u);
    fiber->waiting_in = MH_NONE;
  }
}

// Identifiers, declared in include/msl/cpu.h; `which` is numbered as in ../kernels.py.
uint32_t __mh_identifier(uint32_t which, uint32_t axis) {
  uint32_t t = __mh_self.thread, x = t % mh.group_size[0], y = t / mh.group_size[0] % mh.group_size[1],
           z = t / mh.group_size[0] / mh.group_size[1];
  uint32_t position[3] = {x, y, z};
  switch (which) {
    case 0:
      return mh.group_position[axis] * mh.launch->group[axis] + position[axis];
    case 1:
      return mh.launch->grid[axis];
    case 2:
      return mh.group_position[axis];
    case 3:
      return mh.group_count[axis];
    case 4:
      return position[axis];
    case 5:
      return mh.group_size[axis];
    case 6:
      return mh.launch->group[axis];
    case 7:
      return t;
    case 8:
      return t % MH_LANES;
    case 9:
      return t / MH_LANES;
    case 10:
      return mh.simdgroups;
    case 12:
      return t % MH_QUAD;
    case 13:
      return t / MH_QUAD;
    case 14:
      return (mh.threads + MH_QUAD - 1) / MH_QUAD;
    default:
      return MH_LANES;
  }
}

void* __mh_argument(uint32_t index) { return (void*)mh.launch->arguments[index]; }
void* __mh_threadgroup_argument(uint32_t index) { return (void*)mh.launch->threadgroup_arguments[index]; }

static void run_threadgroup(void) {
  struct mh_launch* launch = mh.launch;
  mh.threads = mh.live = mh.group_size[0] * mh.group_size[1] * mh.group_size[2];
  mh.simdgroups = (mh.threads + MH_LANES - 1) / MH_LANES;
  mh.at_barrier = mh.epoch[0] = mh.epoch[1] = 0;
  mh.group_serial++;
  for (uint32_t s = 0; s < mh.simdgroups; ++s) {
    uint32_t lanes = mh.threads - s * MH_LANES;
    uint32_t exists = lanes >= MH_LANES ? ~0u : (1u << lanes) - 1;
    mh.simdgroup[s] = (struct mh_simdgroup){.exists = exists, .ready = exists};
  }
  for (uint32_t t = 0; t < mh.threads; ++t) {
    mh.fibers[t].waiting_in = MH_NONE;
    mh.fibers[t].site = 0;
    mh.fibers[t].stack_pointer = mh_prepare_stack(launch->stacks + (t + 1) * launch->stack_size);
  }
  // Nobody may count on what threadgroup memory holds at the start: give it NaNs.
  for (uint64_t i = 0; i < launch->variable_count; ++i)
    memset((void*)launch->variables[i].address, 0xff, launch->variables[i].size);
  if (launch->regions) mh_begin_threadgroup();
  __mh_self.thread = MH_LANES - 1;  // so that the first to run is thread 0
  run_next(&mh.scheduler);
}

int __mh_launch(struct mh_launch* launch) {
  mh.launch = launch;
  mh.random = launch->seed * 0x9E3779B97F4A7C15ull | 1;
  mh.group_serial = 0;
  mh.abandoned = false;
  mh.atomic = mh.matrix = 0;
  mh_forget_layouts();
  for (int i = 0; i < 3; ++i) mh.group_count[i] = (launch->grid[i] + launch->group[i] - 1) / launch->group[i];
  for (uint32_t z = 0; z < mh.group_count[2]; ++z)
    for (uint32_t y = 0; y < mh.group_count[1]; ++y)
      for (uint32_t x = 0; x < mh.group_count[0]; ++x) {
        uint32_t position[3] = {x, y, z};
        for (int i = 0; i < 3; ++i) {  // the groups at the grid's far edges hold fewer threads
          uint32_t left = launch->grid[i] - position[i] * launch->group[i];
          mh.group_position[i] = position[i];
          mh.group_size[i] = left < launch->group[i] ? left : launch->group[i];
        }
        run_threadgroup();
        if (mh.abandoned) return 1;
      }
  return 0;
}
