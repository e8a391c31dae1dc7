// The forward pass: FlashAttention-2, algorithm 1 (Dao, 2023, https://arxiv.org/abs/2307.08691). "Line 8" and so on are its
// lines, and q, k, v, o, s, p, m, l are its letters.
//
// A simdgroup takes ROWS queries (the paper's block i) of one head through the keys that they see, KEYS at a time (block j).
// s, p and o never leave its registers. What a score is, and how exp(s - m) is rounded: scoring.metal.
// BUFFERS, INPUTS and the names in params[...] are declared by the host: FORWARD in simdgroup.py.

// A simdgroup's queries, and their attention over the blocks so far.
struct State {
  Queries q;
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
  int first_row;
  Kept kept;
};

// Line 8: s = q k^T for key fragments `begin` to `end` - 1, a slab of the head dim after the other, so that few fragments of k
// and q are in registers together.
template <typename S>
struct ScoresOf {
  template <typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread State& state,
      AnyLaneRows rows,
      int begin,
      int end,
      Lane lane) {
    Operand q[ROW_FRAGMENTS][S::W];
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) state.q.template slab<S>(q[r], r, lane);
    UNROLL for (int n = begin; n < end; ++n) {
      Operand k[S::W];
      S::load_right_transposed_slab(k, rows.at(key_of(0, n, 0, 0)), rows.at(key_of(0, n, 0, 1)), lane);
      UNROLL for (int f = 0; f < S::W; ++f)
        UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) simdgroup_multiply_accumulate(s[r][n], q[r][f], k[f], s[r][n]);
    }
    ScoresOf<typename S::Rest>::add(s, state, rows, begin, end, lane);
  }
};
template <int DIM, int ALIGNED, int FIRST>
struct ScoresOf<Slab<DIM, ALIGNED, FIRST, END>> {
  template <typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State&, AnyLaneRows, int, int, Lane) {}
};

template <bool EDGE, typename AnyKeys>
METAL_FUNC void compute_qk(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State& state, AnyKeys keys, int first_key, Lane lane) {
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) s[r][n] = zeros();
  LaneRows<EDGE, decltype(keys.k)> rows;
  rows.begin(keys.k, key_of(first_key, 0, lane.column, 0), keys.seqlen);
  // At an edge the address of each key is its own: one fragment of keys at a time, so that few are needed together.
  constexpr int COUNT = EDGE ? 1 : KEY_FRAGMENTS;
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; n += COUNT) {
#if SHARED_Q
    simdgroup_barrier(mem_flags::mem_threadgroup);  // so that no compiler keeps q in registers from one use to the next
#endif
    ScoresOf<SlabD>::add(s, state, rows, n, n + COUNT, lane);
  }
}

// Line 9, and of line 10 the rescaling of o: scales and masks s, then
//   m_new = max(m, rowmax(s)),  p = exp(s - m_new),  l = exp(m - m_new) l + rowsum(p),  o = exp(m - m_new) o.
// Where keys may be hidden, `visible` tells which scores are not: bit 2 n + e of a row.
template <bool EDGE, bool MASKED>
METAL_FUNC void online_softmax(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread ushort (&visible)[ROW_FRAGMENTS],
    thread State& state,
    Scoring scoring,
    MaskTile mask_tile,
    int first_key,
    int seqlen_k,
    Lane lane) {
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    // Scale, soft-cap, ALiBi, window, mask.
    int row = state.first_row + 8 * r + lane.row;
    float m = -INFINITY;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        int key = key_of(first_key, n, lane.column, e);
        float x = s[r][n].thread_elements()[e];
#if SCORES_ARE_SCALED
        x = score_mod(x, scoring, min(row, scoring.seqlen_q - 1), EDGE ? min(key, seqlen_k - 1) : key);
#endif
        if (EDGE && !MASKED && !is_visible(scoring, row, key, seqlen_k)) x = -INFINITY;
        s[r][n].thread_elements()[e] = x;
        m = max(m, x);
      }
    }
#if HAS_MASK
    if (MASKED) {
      m = -INFINITY;
      UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
        UNROLL for (int e = 0; e < 2; ++e) {
          float x = apply_mask(s[r][n].thread_elements()[e], mask_tile.at(r, n, e));
          s[r][n].thread_elements()[e] = x;
          m = max(m, x);
        }
      }
    }
#endif
    if (EDGE || MASKED) {
      visible[r] = 0;
      UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n)
        UNROLL for (int e = 0; e < 2; ++e)
          visible[r] |= ushort(s[r][n].thread_elements()[e] == -INFINITY ? 0 : 1 << (2 * n + e));
    }
    // m_new = max(m, rowmax(s))
    m = max(row_max(m), state.m[r]);
    float base = m == -INFINITY ? 0.0f : m;  // a row that has seen nothing yet: -inf - -inf would be NaN
    // p = exp(s - m_new). Dropout takes from p, not from l.
    float sum = 0.0f;
    KeptRow kept = state.kept.row(r, first_key, lane);
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        float x = exp_of_difference(s[r][n].thread_elements()[e], base, scoring);
        sum += x;
        p[r][n].thread_elements()[e] = T(kept.at(n, e) ? x : 0.0f);
      }
    }
    // o and l by alpha = exp(m - m_new), which is 1 unless the maximum of a row has grown
    if (simd_any(m > state.m[r])) {
      float rescale = exp_of_difference(state.m[r], base, scoring);
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
        state.o[r][f].thread_elements()[0] *= rescale;
        state.o[r][f].thread_elements()[1] *= rescale;
      }
      state.l[r] *= rescale;
      state.m[r] = m;
    }
    // l += rowsum(p)
    state.l[r] += sum;
  }
}

// Line 10: o += p v. A hidden key has p = 0, but 0 * NaN is NaN, and memory that no query sees may hold anything. So where
// keys may be hidden, at an edge or by a mask, NaN and infinities in v are replaced by 0, and NaN is put into o for those
// queries alone that see them.
template <typename S>
struct ValuesOf {
  // Keys of fragment n; `row` is this lane's. HIDDEN: some may be.
  template <bool HIDDEN, typename Row>
  METAL_FUNC static void add(
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      thread State& state,
      Row row,
      int n,
      Lane lane) {
    Operand v[S::W];
    S::load_right_slab(v, row, lane);
    if (HIDDEN) {
      float nan_if_nonfinite = 0.0f;
      UNROLL for (int f = 0; f < S::W; ++f)
        nan_if_nonfinite += 0.0f * float(v[f].thread_elements()[0]) + 0.0f * float(v[f].thread_elements()[1]);
      if (simd_any(nan_if_nonfinite != 0.0f)) spread_nonfinite(v, visible, state, n);
    }
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int f = 0; f < S::W; ++f)
        simdgroup_multiply_accumulate(state.o[r][S::FRAGMENT + f], p[r][n], v[f], state.o[r][S::FRAGMENT + f]);
    ValuesOf<typename S::Rest>::template add<HIDDEN>(p, visible, state, row, n, lane);
  }

  METAL_FUNC static void spread_nonfinite(
      thread Operand* v, thread ushort (&visible)[ROW_FRAGMENTS], thread State& state, int n) {
    UNROLL for (int f = 0; f < S::W; ++f) {
      Operand nonfinite;  // 1 where v is not finite
      UNROLL for (int e = 0; e < 2; ++e) {
        bool is_nonfinite = !isfinite(float(v[f].thread_elements()[e]));
        nonfinite.thread_elements()[e] = T(is_nonfinite ? 1.0f : 0.0f);
        if (is_nonfinite) v[f].thread_elements()[e] = T(0.0f);
      }
      UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        Operand sees;  // 1 where the query sees the key
        UNROLL for (int e = 0; e < 2; ++e) sees.thread_elements()[e] = T(visible[r] >> (2 * n + e) & 1 ? 1.0f : 0.0f);
        Accumulator nonfinite_seen = zeros();  // how many of them each query sees, in each column
        simdgroup_multiply_accumulate(nonfinite_seen, sees, nonfinite, nonfinite_seen);
        UNROLL for (int e = 0; e < 2; ++e)
          if (nonfinite_seen.thread_elements()[e] > 0.0f) state.o[r][S::FRAGMENT + f].thread_elements()[e] = NAN;
      }
    }
  }
};
template <int DIM, int ALIGNED, int FIRST>
struct ValuesOf<Slab<DIM, ALIGNED, FIRST, END>> {
  template <bool HIDDEN, typename Row>
  METAL_FUNC static void add(
      thread Operand (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread ushort (&)[ROW_FRAGMENTS], thread State&, Row, int, Lane) {}
};

template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void accumulate_pv(
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread ushort (&visible)[ROW_FRAGMENTS],
    thread State& state,
    AnyKeys keys,
    int first_key,
    Lane lane) {
  LaneRows<EDGE, decltype(keys.v)> rows;
  rows.begin(keys.v, key_of(first_key, 0, lane.row, 0), keys.seqlen);
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n)
    ValuesOf<SlabV>::template add<EDGE || MASKED>(p, visible, state, rows.at(key_of(0, n, 0, 0)), n, lane);
}

// Lines 7 to 10 for the block of keys from `first_key` on. EDGE: the sequence's end or a side of the window lies in it.
// MASKED: `mask_tile` is applied, in which what lies beyond an edge is hidden too.
template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void attend_block(thread State& state, AnyKeys keys, Scoring scoring, MaskTile mask_tile, int first_key, Lane lane) {
  Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
  Operand p[ROW_FRAGMENTS][KEY_FRAGMENTS];
  ushort visible[ROW_FRAGMENTS];
  state.kept.move_to(state.first_row, first_key, lane);  // before s takes registers
  compute_qk<EDGE>(s, state, keys, first_key, lane);
  online_softmax<EDGE, MASKED>(s, p, visible, state, scoring, mask_tile, first_key, keys.seqlen, lane);
  accumulate_pv<EDGE, MASKED>(p, visible, state, keys, first_key, lane);
}

// Chooses the code for one block, with no more tests in it than the block needs: a test inside the loops over fragments would
// keep the compiler from moving loads ahead of it. `altered`: the mask changes scores of this block, so it must be read.
template <typename AnyKeys>
METAL_FUNC void dispatch_block(
    bool altered, thread State& state, AnyKeys keys, Scoring scoring, VisibleRange range, int first_key, Lane lane) {
  MaskTile mask_tile;
  bool inner = range.contains(first_key, KEYS);
#if HAS_MASK
  if (altered) mask_tile.load(!inner, scoring, state.first_row, first_key, keys.seqlen, lane);
#endif
  if (inner && !(HAS_MASK && altered)) {
    attend_block<false, false>(state, keys, scoring, mask_tile, first_key, lane);
  } else if (HAS_MASK && inner) {
    attend_block<false, HAS_MASK != 0>(state, keys, scoring, mask_tile, first_key, lane);
  } else {
    attend_block<true, HAS_MASK != 0>(state, keys, scoring, mask_tile, first_key, lane);
  }
}

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
kernel void attention_forward(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int head = int(group.y);
  // Line 3. Under a causal mask the last queries see most keys: they come first, so that no long tile is left for the end.
  int tile_index = HAS_WINDOW_RIGHT && !HAS_CU_SEQLENS_Q ? int(groups.x - 1 - group.x) : int(group.x);
  Tile tile = tile_of(tile_index, int(group.z), ROWS * SIMDGROUPS, in);
  Sequence sequence = tile.sequence;
  Scoring scoring = scoring_of(sequence, head, in);
  int group_first_row = tile.index * ROWS * SIMDGROUPS;
  if (group_first_row >= sequence.rows_q) return;
  bool has_queries = group_first_row < sequence.seqlen_q;  // of the group: else its rows are zeroed

  // Lines 4 and 5: load q; o = 0, l = 0, m = -inf.
  State state;
  state.first_row = group_first_row + simdgroup * ROWS;
  state.kept.begin(dropout_of(sequence, head, in));
  int last_row = min(state.first_row + ROWS, sequence.seqlen_q) - 1;
#if SHARED_Q
  threadgroup QueryMemory q_memory;
  state.q.elements = q_memory.elements[simdgroup];
#endif
  device const T* q_head = q + sequence.batch * params[Q_BATCH] + sequence.first_q * params[Q_ROW] + head * params[Q_HEAD];
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = min(state.first_row + 8 * r + lane.row, sequence.seqlen_q - 1);
    if (has_queries) state.q.load(r, q_head + row * params[Q_ROW], scoring.sign, lane);
    UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) state.o[r][f] = zeros();
    state.m[r] = -INFINITY;
    state.l[r] = 0.0f;
  }

  // Line 6: the blocks of keys that these queries see. Under a mask in runs: `scan_mask` looks at a run's blocks together.
  Keys keys = keys_of(sequence, head, k, v, in);
  VisibleRange range = key_range_of(scoring, state.first_row, last_row, sequence.seqlen_k);
  bool is_needed = state.first_row < sequence.seqlen_q;  // has the simdgroup queries?
#if STAGED
  // All simdgroups of the group copy every block that one of them sees; those that see it compute.
  threadgroup Staging<KEYS, KEY_STEP> staging;
  int group_last_row = min(group_first_row + ROWS * SIMDGROUPS, sequence.seqlen_q) - 1;
  VisibleRange group_range = key_range_of(scoring, group_first_row, group_last_row, sequence.seqlen_k);
  if (!has_queries) group_range.visible_end = group_range.visible_begin;
#if HAS_MASK
  for (int run = group_range.visible_begin; run < group_range.visible_end; run += BLOCKS_PER_RUN * KEYS) {
    BlockFlags flags;
    flags.visible = flags.altered = 0;
    if (is_needed) flags = scan_mask(range, scoring, state.first_row, run, KEYS, keys.seqlen, lane);
    uint visible = visible_to_any(staging.votes, flags.visible, run / (BLOCKS_PER_RUN * KEYS) % 2, simdgroup, index);
    for (; visible; visible &= visible - 1) {
      uint block = ctz(visible);
      int first_key = run + int(block) * KEYS;
      StagedKeys staged = stage(staging, keys, first_key, ushort(simdgroup * 32 + index));
      if (!(flags.visible >> block & 1)) continue;
      dispatch_block(flags.altered >> block & 1, state, staged, scoring, range, first_key, lane);
    }
  }
#else
  for (int first_key = group_range.visible_begin; first_key < group_range.visible_end; first_key += KEYS) {
    StagedKeys staged = stage(staging, keys, first_key, ushort(simdgroup * 32 + index));
    if (range.overlaps(first_key, KEYS) && is_needed) dispatch_block(false, state, staged, scoring, range, first_key, lane);
  }
#endif
#else
  if (!is_needed) range.visible_end = range.visible_begin;
#if HAS_MASK
  for (int run = range.visible_begin; run < range.visible_end; run += BLOCKS_PER_RUN * KEYS) {
    BlockFlags flags = scan_mask(range, scoring, state.first_row, run, KEYS, keys.seqlen, lane);
    for (; flags.visible; flags.visible &= flags.visible - 1) {
      uint block = ctz(flags.visible);
      int first_key = run + int(block) * KEYS;
      dispatch_block(flags.altered >> block & 1, state, keys, scoring, range, first_key, lane);
    }
  }
#else
  for (int first_key = range.visible_begin; first_key < range.visible_end; first_key += KEYS)
    dispatch_block(false, state, keys, scoring, range, first_key, lane);
#endif
#endif

  // Lines 12 to 15: o / l, and the log-sum-exp m + log(l). A query that saw no key has l = 0: zeros and -inf. Padding
  // rows get the same; their state is garbage.
  device T* out_head = out + sequence.batch * params[OUT_BATCH] + sequence.first_q * params[OUT_ROW] + head * params[OUT_HEAD];
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = state.first_row + 8 * r + lane.row;
    RowStatistics statistics = statistics_of(state.m[r], row_sum(state.l[r]), scoring, head, in);
    if (row < sequence.rows_q) {
      bool is_query = row < sequence.seqlen_q;
      if (!is_query) UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) state.o[r][f] = zeros();
      float factor = statistics.l > 0.0f ? keys.v_descale * statistics.rescale / statistics.l : 0.0f;
      SlabV::store(out_head + row * params[OUT_ROW], state.o[r], state.kept.dropout.scaled(factor), lane);
#if HAS_LSE
      if (lane.column == 0)
        lse[sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD] + row] =
            is_query ? log_sum_exp(statistics) : -INFINITY;
#endif
    }
  }
}
