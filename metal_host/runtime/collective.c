// What the lanes of a simdgroup do together. The last to arrive does the work for all: every lane's operands lie on its
// stack.
#include "runtime.h"

// Lane -> (row, first column) of an 8x8 fragment, Apple's order: row bits {4, 2, 1} of the lane, column bits {3, 0},
// two columns each.
static inline uint32_t fragment_row(uint32_t lane) { return (lane >> 2 & 4) | (lane >> 1 & 3); }
static inline uint32_t fragment_column(uint32_t lane) { return (lane >> 1 & 4) | (lane & 1) << 1; }

static void matrix_product(uint32_t base, uint32_t lanes) {
  float a[8][8] = {{0}}, b[8][8] = {{0}}, d[8][8] = {{0}};
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    uint32_t lane = (uint32_t)__builtin_ctz(rest), r = fragment_row(lane), c = fragment_column(lane);
    const float* in = mh.fibers[base + lane].in;
    for (int i = 0; i < 2; ++i) a[r][c + i] = in[i], b[r][c + i] = in[2 + i], d[r][c + i] = in[4 + i];
  }
  for (int r = 0; r < 8; ++r)
    for (int k = 0; k < 8; ++k)
      for (int c = 0; c < 8; ++c) d[r][c] += a[r][k] * b[k][c];
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    uint32_t lane = (uint32_t)__builtin_ctz(rest), r = fragment_row(lane), c = fragment_column(lane);
    float* out = mh.fibers[base + lane].out;
    out[0] = d[r][c], out[1] = d[r][c + 1];
  }
}

static void shuffle(uint32_t base, uint32_t lanes) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    struct mh_fiber* to = &mh.fibers[base + (uint32_t)__builtin_ctz(rest)];
    uint32_t source = to->source_lane;
    if (source >= MH_LANES || !(lanes >> source & 1)) {  // undefined in Metal
      memset(to->out, 0xff, to->size);
      if (mh.launch->regions) {
        struct mh_report* report = mh_new_report(MH_INACTIVE_LANE, to->site, 0);
        if (report)
          report->kind = MH_SHUFFLE, report->thread = base + (uint32_t)__builtin_ctz(rest),
          report->other_thread = source, report->mask = lanes;
      }
      continue;
    }
    const void* in = mh.fibers[base + source].in;
    if (to->size == 4)
      *(uint32_t*)to->out = *(const uint32_t*)in;
    else
      memcpy(to->out, in, to->size);
  }
}

static void gather(uint32_t base, uint32_t lanes) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    struct mh_fiber* to = &mh.fibers[base + (uint32_t)__builtin_ctz(rest)];
    to->source_lane = lanes;
    for (uint32_t from = lanes; from; from &= from - 1) {
      uint32_t lane = (uint32_t)__builtin_ctz(from);
      const void* in = mh.fibers[base + lane].in;
      if (to->size == 4)
        ((uint32_t*)to->out)[lane] = *(const uint32_t*)in;
      else
        memcpy((char*)to->out + (size_t)lane * to->size, in, to->size);
    }
  }
}

static void vote(uint32_t base, uint32_t lanes) {
  uint32_t ballot = 0;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    uint32_t lane = (uint32_t)__builtin_ctz(rest);
    ballot |= (uint32_t)(*(const uint32_t*)mh.fibers[base + lane].in != 0) << lane;
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    struct mh_fiber* to = &mh.fibers[base + (uint32_t)__builtin_ctz(rest)];
    to->source_lane = lanes;
    *(uint32_t*)to->out = ballot;
  }
}

void mh_perform(struct mh_simdgroup* sg, uint32_t base, uint32_t lanes) {
  const struct mh_fiber* first = &mh.fibers[base + (uint32_t)__builtin_ctz(lanes)];
  struct mh_counters* counters = &mh.launch->counters;
  switch (first->waiting_in) {
    case MH_SHUFFLE:
      shuffle(base, lanes), counters->shuffles++;
      break;
    case MH_GATHER:
      gather(base, lanes), counters->reductions++;
      break;
    case MH_VOTE:
      vote(base, lanes), counters->reductions++;
      break;
    case MH_MATRIX:
      matrix_product(base, lanes), counters->matrix_products++;
      break;
    case MH_TENSOR:
      mh_perform_tensor(base, MH_LANES, lanes);
      break;
    default:
      sg->epoch[0] += (first->flags & MH_MEM_DEVICE) != 0;
      sg->epoch[1] += (first->flags & MH_MEM_THREADGROUP) != 0;
      counters->simdgroup_barriers++;
  }
  sg->in_collective &= ~lanes;
  sg->ready |= lanes;
}

// bfloat arithmetic of the compiled kernels where the processor has none: round to nearest even, keep NaNs NaN.
__bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint16_t rounded = (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)(bits >> 16 | 0x40)
                                                      : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  memcpy(&result, &rounded, sizeof result);
  return result;
}
