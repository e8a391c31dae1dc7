// FlashAttention-2 forward (Dao, 2023, arXiv:2307.08691): a simdgroup takes ROWS queries of one head through all the keys
// that they see, KEYS at a time. s, p and o never leave its registers.

constant constexpr int D_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int DV_FRAGMENTS = (HEAD_DIM_V + 7) / 8;

typedef Slab<HEAD_DIM, VECTOR> SlabD;
typedef Slab<HEAD_DIM_V, VECTOR_V> SlabV;

// A simdgroup's queries and what is known of their attention so far.
struct State {
  Operand q[ROW_FRAGMENTS][D_FRAGMENTS];
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];
  float m[ROW_FRAGMENTS];  // of each row: the largest score,
  float l[ROW_FRAGMENTS];  // and this lane's share of the sum of exponentials
  int first_row;
};

// s = q k^T. Keys past the end are read as the last one.
template <bool EDGE, typename AnyKeys>
METAL_FUNC void score(thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State& state, AnyKeys keys, int first, Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    int key0 = key_of(first, n, lane.column, 0);
    int key1 = key_of(first, n, lane.column, 1);
    if (EDGE) {
      key0 = min(key0, keys.seqlen - 1);
      key1 = min(key1, keys.seqlen - 1);
    }
    Operand k[D_FRAGMENTS];
    SlabD::load_right_transposed(k, keys.k.at(key0), keys.k.at(key1), lane);
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      s[r][n] = zeros();
      UNROLL for (int f = 0; f < D_FRAGMENTS; ++f) simdgroup_multiply_accumulate(s[r][n], state.q[r][f], k[f], s[r][n]);
    }
  }
}

// Masks and scales s, and turns it into probabilities relative to the largest score so far; o and l follow when that grows.
template <bool EDGE, bool MASKED>
METAL_FUNC void soften(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&probabilities)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread State& state,
    Scoring scoring,
    Masking masking,
    int first,
    int seqlen,
    Lane lane) {
  const float factor = SCORES_ARE_SCALED ? 1.0f : scoring.factor;
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = state.first_row + 8 * r + lane.row;
    float m = -INFINITY;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        int key = key_of(first, n, lane.column, e);
        float x = s[r][n].thread_elements()[e];
#if SCORES_ARE_SCALED
        x = score_of(x, scoring, min(row, scoring.seqlen_q - 1), EDGE ? min(key, seqlen - 1) : key);
#endif
        if (EDGE && !MASKED && !is_seen(scoring, row, key, seqlen)) x = -INFINITY;
        s[r][n].thread_elements()[e] = x;
        m = max(m, x);
      }
    }
#if HAS_MASK
    if (MASKED) {
      m = -INFINITY;
      UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
        UNROLL for (int e = 0; e < 2; ++e) {
          float x = masked(s[r][n].thread_elements()[e], masking.at(r, n, e));
          s[r][n].thread_elements()[e] = x;
          m = max(m, x);
        }
      }
    }
#endif
    m = max(row_max(m) * factor, state.m[r]);
    float base = m == -INFINITY ? 0.0f : m;  // a row that has seen nothing yet: -inf - -inf is NaN
    float sum = 0.0f;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
#if IN_BASE_E
        float x = exp_of(s[r][n].thread_elements()[e], base);
#else
        float x = fast::exp2(fma(s[r][n].thread_elements()[e], factor, -base));
#endif
        probabilities[r][n].thread_elements()[e] = T(x);
        sum += x;
      }
    }
    if (simd_any(m > state.m[r])) {
      float shrink = exp_of(state.m[r], base);
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
        state.o[r][f].thread_elements()[0] *= shrink;
        state.o[r][f].thread_elements()[1] *= shrink;
      }
      state.l[r] *= shrink;
      state.m[r] = m;
    }
    state.l[r] += sum;
  }
}

// o += p v. Where scores may be hidden, at an edge or by a mask, a value that is not finite counts only for the queries that
// see its key: 0 * NaN is NaN, and memory that nobody sees may hold one.
template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void gather(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&probabilities)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread State& state,
    AnyKeys keys,
    int first,
    Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    int key = key_of(first, n, lane.row, 0);
    if (EDGE) key = min(key, keys.seqlen - 1);
    Operand v[DV_FRAGMENTS];
    SlabV::load_right(v, keys.v.at(key), lane);
    if (EDGE || MASKED) {
      float finite = 0.0f;  // NaN if any value is not
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f)
        finite += 0.0f * float(v[f].thread_elements()[0]) + 0.0f * float(v[f].thread_elements()[1]);
      if (simd_any(finite != 0.0f)) {
        UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
          Operand bad;
          UNROLL for (int e = 0; e < 2; ++e) {
            bool is_bad = !isfinite(float(v[f].thread_elements()[e]));
            bad.thread_elements()[e] = T(is_bad ? 1.0f : 0.0f);
            if (is_bad) v[f].thread_elements()[e] = T(0.0f);
          }
          UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
            Operand seen;
            UNROLL for (int e = 0; e < 2; ++e) seen.thread_elements()[e] = T(s[r][n].thread_elements()[e] == -INFINITY ? 0.0f : 1.0f);
            Accumulator spoilt = zeros();
            simdgroup_multiply_accumulate(spoilt, seen, bad, spoilt);
            UNROLL for (int e = 0; e < 2; ++e)
              if (spoilt.thread_elements()[e] > 0.0f) state.o[r][f].thread_elements()[e] = NAN;
          }
        }
      }
    }
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f)
        simdgroup_multiply_accumulate(state.o[r][f], probabilities[r][n], v[f], state.o[r][f]);
  }
}

// One block of keys, `first` to `first + KEYS`. EDGE: some of its scores may not count. MASKED: `masking` may change some, and
// knows about edges too. Each has code of its own, since loads are not moved over a branch.
template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void attend(thread State& state, AnyKeys keys, Scoring scoring, Masking masking, int first, Lane lane) {
  Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
  Operand probabilities[ROW_FRAGMENTS][KEY_FRAGMENTS];
  score<EDGE>(s, state, keys, first, lane);
  soften<EDGE, MASKED>(s, probabilities, state, scoring, masking, first, keys.seqlen, lane);
  gather<EDGE, MASKED>(s, probabilities, state, keys, first, lane);
}

// One block of keys. `changed`: what the mask says of it must be read.
template <typename AnyKeys>
METAL_FUNC void visit(bool changed, thread State& state, AnyKeys keys, Scoring scoring, Range range, int first, Lane lane) {
  Masking masking;
  bool inner = range.holds(first);
#if HAS_MASK
  if (changed) masking.load(!inner, scoring, state.first_row, first, keys.seqlen, lane);
#endif
  if (inner && !(HAS_MASK && changed)) {
    attend<false, false>(state, keys, scoring, masking, first, lane);
  } else if (HAS_MASK && inner) {
    attend<false, HAS_MASK != 0>(state, keys, scoring, masking, first, lane);
  } else {
    attend<true, HAS_MASK != 0>(state, keys, scoring, masking, first, lane);
  }
}

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_forward(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int head = int(group.y);
  // The queries that see most keys come first, so that no long tile is left for the end.
  int turn = HAS_WINDOW_RIGHT && !HAS_CU_SEQLENS_Q ? int(groups.x - 1 - group.x) : int(group.x);
  Tile tile = tile_of(turn, int(group.z), ROWS * SIMDGROUPS, in);
  Sequence sequence = tile.sequence;
  Scoring scoring = scoring_of(sequence, head, in);
  int group_first = tile.index * ROWS * SIMDGROUPS;
  if (group_first >= sequence.seqlen_q) return;

  State state;
  state.first_row = group_first + simdgroup * ROWS;
  int last_row = min(state.first_row + ROWS, sequence.seqlen_q) - 1;
  device const T* q_head = q + sequence.batch * params[Q_BATCH] + sequence.first_q * params[Q_ROW] + head * params[Q_HEAD];
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = min(state.first_row + 8 * r + lane.row, sequence.seqlen_q - 1);
    SlabD::load_left(state.q[r], q_head + row * params[Q_ROW], scoring.sign, lane);
    UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) state.o[r][f] = zeros();
#if HAS_SINKS
    state.m[r] = in.sinks[head] * UNIT;
    state.l[r] = lane.column == 0 ? 1.0f : 0.0f;
#else
    state.m[r] = -INFINITY;
    state.l[r] = 0.0f;
#endif
  }

  Keys keys = keys_of(sequence, head, k, v, in);
  Range range = range_of(scoring, state.first_row, last_row, sequence.seqlen_k);
#if STAGED
  bool has_rows = state.first_row < sequence.seqlen_q;
  threadgroup Staging staging;
  Range group_range = range_of(scoring, group_first, min(group_first + ROWS * SIMDGROUPS, sequence.seqlen_q) - 1, sequence.seqlen_k);
#if HAS_MASK
  for (int run = group_range.some_begin; run < group_range.some_end; run += OUTLOOK * KEYS) {
    Outlook outlook;
    outlook.some = outlook.changed = 0;
    if (has_rows) outlook = outlook_of(range, scoring, state.first_row, run, keys.seqlen, lane);
    uint wanted = wanted_by_any(staging, outlook.some, run / (OUTLOOK * KEYS) % 2, simdgroup, index);
    for (; wanted; wanted &= wanted - 1) {
      uint block = ctz(wanted);
      int first = run + int(block) * KEYS;
      StagedKeys staged = stage(staging, keys, first, ushort(simdgroup * 32 + index));
      if (!(outlook.some >> block & 1)) continue;
      visit(outlook.changed >> block & 1, state, staged, scoring, range, first, lane);
    }
  }
#else
  for (int first = group_range.some_begin; first < group_range.some_end; first += KEYS) {
    StagedKeys staged = stage(staging, keys, first, ushort(simdgroup * 32 + index));
    if (range.meets(first) && has_rows) visit(false, state, staged, scoring, range, first, lane);
  }
#endif
#else
  if (state.first_row >= sequence.seqlen_q) return;
#if HAS_MASK
  for (int run = range.some_begin; run < range.some_end; run += OUTLOOK * KEYS) {
    Outlook outlook = outlook_of(range, scoring, state.first_row, run, keys.seqlen, lane);
    for (; outlook.some; outlook.some &= outlook.some - 1) {
      uint block = ctz(outlook.some);
      int first = run + int(block) * KEYS;
      visit(outlook.changed >> block & 1, state, keys, scoring, range, first, lane);
    }
  }
#else
  for (int first = range.some_begin; first < range.some_end; first += KEYS)
    visit(false, state, keys, scoring, range, first, lane);
#endif
#endif

  device T* out_head = out + sequence.batch * params[OUT_BATCH] + sequence.first_q * params[OUT_ROW] + head * params[OUT_HEAD];
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = state.first_row + 8 * r + lane.row;
    float sum = row_sum(state.l[r]);
    if (row < sequence.seqlen_q) {
      SlabV::store(out_head + row * params[OUT_ROW], state.o[r], sum > 0.0f ? 1.0f / sum : 0.0f, lane);
#if HAS_LSE
      if (lane.column == 0)
        lse[sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD] + row] = log_sum(state.m[r], sum);
#endif
    }
  }
}
