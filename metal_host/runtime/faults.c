// Reports, and the checks of who reached a barrier or a collective.
#include "runtime.h"

// A number for the source line of a return address: unrolled loops have many addresses on a line.
static uint64_t line_of(uint64_t site) {
  uint64_t low = 0, high = mh.launch->site_count;
  while (low < high) {
    uint64_t middle = (low + high) / 2;
    if (mh.launch->sites[middle] < site)
      low = middle + 1;
    else
      high = middle;
  }
  return low < mh.launch->site_count && mh.launch->sites[low] == site ? mh.launch->site_lines[low] : site;
}

// A report to fill in, or null if one of the same lines exists or there are enough.
struct mh_report* mh_new_report(enum mh_fault fault, uint64_t site, uint64_t other_site) {
  struct mh_launch* launch = mh.launch;
  for (uint32_t i = 0; i < launch->report_count; ++i) {
    const struct mh_report* r = &launch->reports[i];
    if (r->fault == fault && line_of(r->site) == line_of(site) && line_of(r->other_site) == line_of(other_site))
      return 0;
  }
  if (launch->report_count == MH_MAX_REPORTS) return 0;
  struct mh_report* r = &launch->reports[launch->report_count++];
  *r = (struct mh_report){.fault = fault,
                          .site = site,
                          .other_site = other_site,
                          .thread = __mh_self.thread,
                          .region = ~0u,
                          .near_region = ~0u};
  memcpy(r->group, mh.group_position, sizeof r->group);
  return r;
}

void mh_check_barrier(void) {
  const struct mh_fiber* first = 0;
  uint32_t first_thread = 0;
  for (uint32_t t = 0; t < mh.threads && !first; ++t)
    if (mh.fibers[t].waiting_in) first = &mh.fibers[t], first_thread = t;
  for (uint32_t t = 0; first && t < mh.threads; ++t) {
    const struct mh_fiber* fiber = &mh.fibers[t];
    bool here = fiber->waiting_in != MH_NONE;
    if (here && fiber->site == first->site && fiber->flags == first->flags) continue;
    struct mh_report* r = mh_new_report(MH_DIVERGENT_BARRIER, first->site, here ? fiber->site : 0);
    if (r)
      r->kind = first->waiting_in, r->thread = first_thread, r->other_thread = t, r->mask = mh.at_barrier,
      r->size = mh.threads, r->write = here && fiber->flags != first->flags;
  }
}

void mh_check_collective(struct mh_simdgroup* sg, uint32_t base, uint32_t lanes) {
  uint32_t lane = (uint32_t)__builtin_ctz(lanes);
  const struct mh_fiber* fiber = &mh.fibers[base + lane];
  // Metal defines votes, reductions and shuffles over the active lanes; barriers and matrices need all.
  if (mh.launch->allow_partial_collectives && fiber->waiting_in != MH_SIMDGROUP_BARRIER &&
      fiber->waiting_in != MH_MATRIX && fiber->waiting_in != MH_TENSOR)
    return;
  uint32_t missing = (uint32_t)__builtin_ctz(sg->exists & ~lanes);
  const struct mh_fiber* other = &mh.fibers[base + missing];
  struct mh_report* r = mh_new_report(MH_DIVERGENT_COLLECTIVE, fiber->site, other->waiting_in ? other->site : 0);
  if (r) {
    r->kind = fiber->waiting_in, r->thread = base + lane, r->other_thread = base + missing;
    r->mask = lanes, r->size = sg->exists;
  }
}

// Are the threads of a tensor operation's scope there? A scope of several simdgroups is the whole threadgroup.
void mh_check_scope(uint32_t threads, uint64_t site) {
  const struct mh_simdgroup* sg = &mh.simdgroup[__mh_self.thread / MH_LANES];
  uint32_t there = threads > MH_LANES ? mh.threads : (uint32_t)__builtin_popcount(sg->exists);
  if (threads == 1 || there == threads) return;
  struct mh_report* r = mh_new_report(MH_SCOPE, site, 0);
  if (r) r->size = there, r->index = threads;
}

// clang's check of array indices (-fsanitize=array-bounds).
struct ubsan_out_of_bounds {
  const char* file;
  uint32_t line, column;
};
static void index_fault(const struct ubsan_out_of_bounds* where, uint64_t index) {
  struct mh_report* r = mh_new_report(MH_INDEX, (uint64_t)where, 0);
  if (r) r->index = (int64_t)index, r->source = (uint64_t)where;
  mh_abandon();  // going on would write into another fiber's frame
}
void __ubsan_handle_out_of_bounds(const struct ubsan_out_of_bounds* where, uint64_t index) {
  index_fault(where, index);
}
void __ubsan_handle_out_of_bounds_abort(const struct ubsan_out_of_bounds* where, uint64_t index) {
  index_fault(where, index);
}
