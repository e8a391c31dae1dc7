// One core of an Apple GPU in the steady state of a kernel's main loop: core.py has the interface and says what it assumes.
//
// Four schedulers, each with every fourth simdgroup. A simdgroup issues in order; a load or a product goes on beside what
// comes after, until something waits for it. Simulated by events: a heap of simdgroups by the time of their next instruction.
#include <stdlib.h>

enum { ALU, EXPONENTIAL, SHUFFLE, PRODUCT, LOAD, STORE, BARRIER, COPY };
typedef struct {
  int kind;
  double issue;    // cycles of the scheduler
  double unit;     // of the core's load unit, or of the pipe of exponentials
  double l2;       // of the path from the second-level cache
  double latency;  // until a result can be used, after the last of those
  int number;      // of its result, or -1
  int first_wait, waits;
} Operation;
typedef struct {
  double time, since;  // when it would issue next; since when it waits: the oldest goes first
  int simdgroup;
} Event;

static int before(Event a, Event b) {
  if (a.time != b.time) return a.time < b.time;
  return a.since != b.since ? a.since < b.since : a.simdgroup < b.simdgroup;
}
static void push(Event* heap, int* count, Event e) {
  int j = (*count)++;
  for (; j && before(e, heap[(j - 1) / 2]); j = (j - 1) / 2) heap[j] = heap[(j - 1) / 2];
  heap[j] = e;
}
static Event pop(Event* heap, int* count) {
  Event first = heap[0], last = heap[--*count];
  int j = 0;
  for (int child; (child = 2 * j + 1) < *count; j = child) {
    if (child + 1 < *count && before(heap[child + 1], heap[child])) child++;
    if (!before(heap[child], last)) break;
    heap[j] = heap[child];
  }
  heap[j] = last;
  return first;
}
static double later(double a, double b) { return a > b ? a : b; }

// Cycles of the core for one round of one threadgroup, with `groups` resident; 0 without memory. busy: shares of the time in
// which schedulers, load unit and path from L2 were. `leader` is the program of a group's first simdgroup, where it differs.
double steady(const Operation* program, int length, const Operation* leader, int leader_length, const int* waits, int numbers,
              int simdgroups, int groups, int rounds, double barrier, double skew, double* busy) {
  int n = groups * simdgroups, count = 0, products = 0;
  double scheduler[4] = {0}, exponentials[4] = {0}, unit = 0, l2 = 0, round_cycles = 0;
  double *ready = calloc((size_t)n * numbers, sizeof *ready), *ended = calloc((size_t)n * rounds, sizeof *ended);
  double *arrival = calloc(groups, sizeof *arrival), *copied = calloc(groups, sizeof *copied);
  int *place = calloc(n, sizeof *place), *round = calloc(n, sizeof *round);
  int *waiting = calloc(groups, sizeof *waiting), *who = calloc(n, sizeof *who);
  Event* heap = malloc((n + 1) * sizeof *heap);
  for (int j = 0; j < length; j++) products += program[j].kind == PRODUCT, round_cycles += program[j].issue;
  double* times = malloc(((size_t)n * rounds * products + 1) * sizeof *times);
  size_t issued = 0;
  busy[0] = busy[1] = busy[2] = 0;
  for (int i = 0; i < n; i++) {  // threadgroups do not run in step
    double start = (i / simdgroups) * skew * round_cycles * simdgroups / 4;
    push(heap, &count, (Event){start, start, i});
  }
  double last = 0;
  while (count) {
    Event e = pop(heap, &count);
    int i = e.simdgroup, g = i / simdgroups, s = i % 4, leads = leader_length && i % simdgroups == 0;
    double t = e.time, next = t, *results = ready + (size_t)i * numbers;
    if (place[i] == (leads ? leader_length : length)) {
      ended[(size_t)i * rounds + round[i]++] = t;
      last = later(last, t);
      place[i] = 0;
      if (round[i] == rounds) continue;
    }
    const Operation* o = (leads ? leader : program) + place[i];
    if (o->kind == BARRIER) {
      place[i]++;
      arrival[g] = later(arrival[g], t);
      who[g * simdgroups + waiting[g]++] = i;
      if (waiting[g] == simdgroups) {
        double at = later(arrival[g], copied[g]) + barrier;
        for (int j = 0; j < simdgroups; j++) push(heap, &count, (Event){at, at, who[g * simdgroups + j]});
        waiting[g] = 0, arrival[g] = 0;
      }
      continue;
    }
    double needed = t;
    for (int j = 0; j < o->waits; j++) needed = later(needed, results[waits[o->first_wait + j]]);
    double start = o->issue > 0 ? later(needed, scheduler[s]) : needed;
    if (start > t) {
      push(heap, &count, (Event){start, later(e.since, needed), i});
      continue;
    }
    place[i]++;
    scheduler[s] = o->issue > 0 ? t + o->issue : scheduler[s];
    busy[0] += o->issue;
    switch (o->kind) {
      case PRODUCT:
        times[issued++] = t;
        results[o->number] = t + o->latency;
        next = t + 1;
        break;
      case EXPONENTIAL:
        exponentials[s] = later(t, exponentials[s]) + o->unit;
        next = later(exponentials[s] - o->unit, t + o->issue) + o->latency;
        break;
      case COPY:
        l2 = later(t, l2) + o->l2;
        busy[2] += o->l2;
        copied[g] = l2 + o->latency;
        next = t + o->issue;
        break;
      case LOAD:
      case STORE: {
        double begin = later(t, unit);
        unit = begin + o->unit;
        busy[1] += o->unit;
        if (o->l2 > 0) l2 = later(begin, l2) + o->l2, busy[2] += o->l2;
        if (o->number >= 0) results[o->number] = later(unit, o->l2 > 0 ? l2 : 0) + o->latency;
        next = t + o->issue;
        break;
      }
      default:  // ALU, SHUFFLE
        next = t + o->issue + o->latency;
    }
    push(heap, &count, (Event){next, next, i});
  }
  // The time in which all simdgroups are past their first round and none has ended its last.
  double begin = 0, end = last;
  for (int i = 0; i < n; i++) {
    begin = later(begin, ended[(size_t)i * rounds]);
    if (ended[(size_t)i * rounds + rounds - 2] < end) end = ended[(size_t)i * rounds + rounds - 2];
  }
  if (end <= begin) begin = 0, end = last;
  begin += 0.05 * (end - begin);
  size_t counted = 0;
  for (size_t j = 0; j < issued; j++) counted += times[j] >= begin && times[j] < end;
  busy[0] /= 4 * last, busy[1] /= last, busy[2] /= last;
  free(ready), free(ended), free(arrival), free(copied), free(place), free(round), free(waiting), free(who), free(heap), free(times);
  return (end - begin) * simdgroups * products / (double)(counted ? counted : 1);
}
