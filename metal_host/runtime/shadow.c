// What every byte of the launch's memory went through: who wrote it last, who has read it since, whether anybody wrote
// it.
//
// Two accesses by different threads, one of them a write, race unless something orders them: a threadgroup barrier
// between them, whose flags name the memory; or, inside one simdgroup, a simdgroup barrier with such flags. Barriers
// are counted per kind of memory (epochs), so "a barrier lies between" is "the counts differ". Nothing orders two
// threadgroups, and shuffles order nothing. Atomics do not race with each other. The loads and stores of a simdgroup
// matrix belong to the simdgroup, not to a lane: which lane moves which element is the hardware's affair.
#include "runtime.h"

struct access {
  uint32_t group;  // serial number of the threadgroup; 0: no access
  uint32_t group_epoch, simdgroup_epoch;
  uint16_t thread;  // from MH_MAX_THREADS on, 32 for each kind of matrix access: simdgroup s's
  uint8_t atomic, write;
  int32_t site;  // relative to the kernel's entry
};

struct cell {
  struct access write;
  struct access read;            // the latest since the write
  struct access read_thread;     // the latest of another thread than read's
  struct access read_simdgroup;  // the latest of another simdgroup than read's
  struct access read_group;      // the latest of another threadgroup than read's
  uint8_t initialised;
};

static struct mh_region* last_region;

static uint32_t simdgroup_of(uint32_t thread) {
  return thread < MH_MAX_THREADS ? thread / MH_LANES : thread % MH_LANES;
}

static bool unordered(const struct access* before, const struct access* now) {
  if (!before->group || (before->atomic && now->atomic)) return false;
  if (before->group != now->group) return true;
  if (mh.launch->lockstep && simdgroup_of(before->thread) == simdgroup_of(now->thread)) return false;
  if (before->thread == now->thread || before->group_epoch != now->group_epoch) return false;
  return simdgroup_of(before->thread) != simdgroup_of(now->thread) || before->simdgroup_epoch == now->simdgroup_epoch;
}

static uint64_t absolute(int32_t site) { return (uint64_t)mh.launch->entry + (uint64_t)(int64_t)site; }

static struct mh_report* report(enum mh_fault fault, uint64_t address, uint32_t size, const struct access* now,
                                uint64_t other_site) {
  struct mh_report* r = mh_new_report(fault, absolute(now->site), other_site);
  if (r) r->address = address, r->size = size, r->write = now->write, r->thread = now->thread;
  if (r && last_region) r->region = (uint32_t)(last_region - mh.launch->regions);
  return r;
}

static void race(uint64_t address, uint32_t size, const struct access* before, const struct access* now) {
  struct mh_report* r = report(MH_RACE, address, size, now, absolute(before->site));
  if (r) r->other_thread = before->thread, r->other_write = before->write, r->mask = before->group != now->group;
}

// Threads that write the same value to one place do no harm, and kernels do it: two writes race if they differ. The
// callback comes before the write, so the verdict waits until the runtime is entered again.
static struct {
  uint64_t address;
  uint32_t size;
  uint8_t old[16];
  struct access before, now;
  struct mh_region* region;
} undecided;

void mh_decide_writes(void) {
  if (!undecided.size) return;
  uint32_t size = undecided.size;
  undecided.size = 0;
  const uint8_t* bytes = (const uint8_t*)undecided.address;
  for (uint32_t i = 0; i < size; ++i)
    if (bytes[i] != undecided.old[i]) {
      last_region = undecided.region;
      race(undecided.address, size, &undecided.before, &undecided.now);
      return;
    }
}

static void race_of_writes(uint64_t address, uint32_t size, const struct access* before, const struct access* now) {
  if (size > sizeof undecided.old) {
    race(address, size, before, now);
    return;
  }
  undecided.address = address, undecided.size = size, undecided.before = *before, undecided.now = *now,
  undecided.region = last_region;
  memcpy(undecided.old, (const void*)address, size);
}

static struct mh_region* find_region(uint64_t address, uint32_t size) {
  struct mh_region* regions = mh.launch->regions;
  if (address + size < address) return 0;  // around the end of the address space
  if (last_region && address >= last_region->start && address + size <= last_region->end) return last_region;
  uint64_t low = 0, high = mh.launch->region_count;
  while (low < high) {
    uint64_t middle = (low + high) / 2;
    if (regions[middle].end <= address)
      low = middle + 1;
    else
      high = middle;
  }
  if (low < mh.launch->region_count && address >= regions[low].start && address + size <= regions[low].end)
    return last_region = &regions[low];
  return 0;
}

static void out_of_bounds(uint64_t address, uint32_t size, const struct access* now) {
  uint64_t best = ~0ull;
  last_region = 0;
  struct mh_report* r = report(MH_OUT_OF_BOUNDS, address, size, now, 0);
  for (uint64_t i = 0; r && i < mh.launch->region_count; ++i) {
    const struct mh_region* region = &mh.launch->regions[i];
    uint64_t distance = address < region->start ? region->start - address
                        : address >= region->end ? address - region->end + size
                                                 : 0;
    if (distance < best && distance < 1ull << 40) best = distance, r->near_region = (uint32_t)i;
  }
  mh_abandon();  // the access itself may not be made
}

static void note_read(struct cell* cell, const struct access* now) {
  struct access* read = &cell->read;
  if (read->group == now->group && read->thread != now->thread) {
    cell->read_thread = *read;
    if (simdgroup_of(read->thread) != simdgroup_of(now->thread)) cell->read_simdgroup = *read;
  } else if (read->group && read->group != now->group) {
    cell->read_group = *read;
    cell->read_thread.group = cell->read_simdgroup.group = 0;
  }
  *read = *now;
}

static void check(uint64_t address, uint32_t size, bool write, uint64_t site) {
  mh_decide_writes();
  const char* stack = mh.launch->stacks + (uint64_t)__mh_self.thread * mh.launch->stack_size;
  if (address >= (uint64_t)stack && address - (uint64_t)stack + size <= mh.launch->stack_size) return;
  if (mh.launch->lockstep && !mh.atomic) mh_step(site);
  struct mh_region* region = find_region(address, size);
  uint32_t space = region && region->space == MH_THREADGROUP, simdgroup = __mh_self.thread / MH_LANES;
  struct access now = {
      .group = mh.group_serial,
      .group_epoch = mh.epoch[space],
      .simdgroup_epoch = mh.simdgroup[simdgroup].epoch[space],
      .thread = (uint16_t)(mh.matrix ? MH_MAX_THREADS + (mh.matrix - 1) * MH_LANES + simdgroup : __mh_self.thread),
      .atomic = (uint8_t)mh.atomic,
      .write = write || mh.atomic,
      .site = (int32_t)(site - (uint64_t)mh.launch->entry),
  };
  if (!region) {
    out_of_bounds(address, size, &now);
    return;
  }
  struct mh_counters* counters = &mh.launch->counters;
  if (region->space == MH_THREADGROUP)
    *(write ? &counters->threadgroup_bytes_written : &counters->threadgroup_bytes_read) += size;
  else if (region->space == MH_CONSTANT)
    counters->constant_bytes_read += size;
  else
    *(write ? &counters->device_bytes_written : &counters->device_bytes_read) += size;
  if (region->space == MH_CONSTANT) return;  // nobody writes there

  struct cell* cell = (struct cell*)region->shadow + (address - region->start);
  bool uninitialised = false, double_write = false;
  struct access first_write = {0};
  for (uint32_t i = 0; i < size; ++i, ++cell) {
    if (!write && space && !cell->initialised) uninitialised = true;
    const struct access* raced = 0;
    if (now.write) {
      const struct access* reads = &cell->read;
      for (int k = 0; k < 4 && !raced; ++k)
        if (unordered(&reads[k], &now)) raced = &reads[k];
    }
    if (unordered(&cell->write, &now)) {
      if (write && !raced && !now.atomic && !cell->write.atomic) {
        if (!double_write) first_write = cell->write;
        double_write = true;
      } else {
        raced = &cell->write;
      }
    }
    if (raced) race(address + i, size, raced, &now);
    if (now.write) {
      cell->write = now;
      for (int k = 0; k < 4; ++k) (&cell->read)[k].group = 0;
      if (write) cell->initialised = 1;
    } else {
      note_read(cell, &now);
    }
  }
  if (double_write) race_of_writes(address, size, &first_write, &now);
  if (uninitialised) report(MH_UNINITIALISED, address, size, &now, 0);
}

void mh_begin_threadgroup(void) {
  struct mh_launch* launch = mh.launch;
  if (mh.group_serial == 1) {
    last_region = 0;
    for (uint64_t i = 0; i < launch->region_count; ++i) {
      struct mh_region* region = &launch->regions[i];
      if (region->space == MH_CONSTANT) continue;
      region->shadow = launch->shadow_memory + launch->shadow_used;
      launch->shadow_used += (region->end - region->start) * sizeof(struct cell);
      if (launch->shadow_used > launch->shadow_size) __builtin_trap();
    }
  }
  for (uint64_t i = 0; i < launch->region_count; ++i) {
    struct mh_region* region = &launch->regions[i];
    if (region->space == MH_THREADGROUP) memset(region->shadow, 0, (region->end - region->start) * sizeof(struct cell));
  }
}

uint64_t __mh_shadow_bytes(void) { return sizeof(struct cell); }

// What include/msl/cpu.h asks for in the instrumented build.
void __mh_count_transcendental(void) { mh.launch->counters.transcendentals++; }
void __mh_atomic_access(uint32_t on) {
  mh.atomic = on;
  mh.launch->counters.atomics += on;
}
void __mh_matrix_access(uint32_t kind) { mh.matrix = kind; }
uint32_t __mh_lane_index(void) { return __mh_self.lane; }

// The callbacks of -fsanitize=thread.
#define SITE ((uint64_t)__builtin_return_address(0))
static void aligned(uint64_t address, uint32_t size, bool write, uint64_t site) {
  if (address & ((size < 8 ? size : 8) - 1)) {
    struct mh_report* r = mh_new_report(MH_MISALIGNED, site, 0);
    if (r) r->address = address, r->size = size, r->write = write;
  }
  check(address, size, write, site);
}
#define CALLBACKS(n)                                                     \
  void __tsan_read##n(void* p) { aligned((uint64_t)p, n, false, SITE); } \
  void __tsan_write##n(void* p) { aligned((uint64_t)p, n, true, SITE); }
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
#define UNALIGNED(n)                                                             \
  void __tsan_unaligned_read##n(void* p) { check((uint64_t)p, n, false, SITE); } \
  void __tsan_unaligned_write##n(void* p) { check((uint64_t)p, n, true, SITE); }
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
void __tsan_read_write1(void* p) { check((uint64_t)p, 1, false, SITE), check((uint64_t)p, 1, true, SITE); }
void __tsan_init(void) {}
void* __tsan_memcpy(void* to, const void* from, uint64_t size) {
  check((uint64_t)from, (uint32_t)size, false, SITE), check((uint64_t)to, (uint32_t)size, true, SITE);
  return memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, uint64_t size) {
  check((uint64_t)from, (uint32_t)size, false, SITE), check((uint64_t)to, (uint32_t)size, true, SITE);
  return memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, uint64_t size) {
  check((uint64_t)to, (uint32_t)size, true, SITE);
  return memset(to, value, size);
}
