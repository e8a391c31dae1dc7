// Few queries against many keys: FlashAttention-2's algorithm 1 as in forward.metal, whose lines are meant here too, but with
// the work cut for reading each byte of k and v once, which is all that takes time.
//
// * The HEADS_IN_TILE heads that share their keys are rows of one tile, of ROWS rows.
// * The keys are split over threadgroups (splits.metal; "Flash-Decoding", Dao, Haziza, Massa, Sizov, 2023,
//   https://pytorch.org/blog/flash-decoding) and over the UNITS of a threadgroup, which take its blocks of KEYS keys in turn.
//   Each has m, l and o of its own keys: `merge_units` puts together those of a threadgroup, combine.metal those of the splits.
// * A unit is SLICES simdgroups, each with a slice of both head dims, so that ROWS rows of q and o fit into registers: the s of
//   a slice are added up in threadgroup memory.

template <int N>
METAL_FUNC void clear(thread Operand (&x)[N]) {
  UNROLL for (int f = 0; f < N; ++f) x[f].thread_elements()[0] = x[f].thread_elements()[1] = T(0.0f);
}

// Line 8: s = q k^T, over the slice. EDGE: there may be fewer keys than the block has; those past the end count as 0.
template <bool EDGE>
METAL_FUNC void compute_qk(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State& state, BlockKeys keys, int first_key, Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    int key0 = key_of(first_key, n, lane.column, 0);
    int key1 = key_of(first_key, n, lane.column, 1);
    bool exists = !EDGE || key0 < keys.seqlen;
    if (EDGE) {
      key0 = min(key0, keys.seqlen - 1);
      key1 = min(key1, keys.seqlen - 1);
    }
    device const T* row0 = keys.k.at(key0);
    device const T* row1 = keys.k.at(key1);
    Operand k[D_FRAGMENTS];
    if (EDGE) clear(k);
    if (exists) SliceD::load_right_transposed(k, row0, row1, state.slice, lane);
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      s[r][n] = zeros();
      UNROLL for (int f = 0; f < D_FRAGMENTS; ++f) simdgroup_multiply_accumulate(s[r][n], state.q[r][f], k[f], s[r][n]);
    }
  }
}

// Line 9, and of line 10 the rescaling of o, as in forward.metal.
template <bool EDGE, bool MASKED>
METAL_FUNC void online_softmax(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread State& state,
    Scoring scoring,
    MaskTile mask_tile,
    int first_key,
    int seqlen_k,
    Lane lane) {
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int query = query_of(state.first_row + 8 * r + lane.row);
#if HAS_ALIBI_SLOPES
    scoring.slope = state.slope[r];
#endif
    float m = -INFINITY;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        int key = key_of(first_key, n, lane.column, e);
        float x = s[r][n].thread_elements()[e];
#if SCORES_ARE_SCALED
        x = score_mod(x, scoring, min(query, scoring.seqlen_q - 1), EDGE ? min(key, seqlen_k - 1) : key);
#endif
        if (EDGE && !MASKED && !is_visible(scoring, query, key, seqlen_k)) x = -INFINITY;
#if HAS_MASK
        if (MASKED) x = apply_mask(x, mask_tile.at(r, n, e));
#endif
        s[r][n].thread_elements()[e] = x;
        m = max(m, x);
      }
    }
    m = max(row_max(m), state.m[r]);
    float base = m == -INFINITY ? 0.0f : m;
    float sum = 0.0f;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        float x = exp_of_difference(s[r][n].thread_elements()[e], base, scoring);
        p[r][n].thread_elements()[e] = T(x);
        sum += x;
      }
    }
    if (simd_any(m > state.m[r])) {
      float rescale = exp_of_difference(state.m[r], base, scoring);
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
        state.o[r][f].thread_elements()[0] *= rescale;
        state.o[r][f].thread_elements()[1] *= rescale;
      }
      state.l[r] *= rescale;
      state.m[r] = m;
    }
    state.l[r] += sum;
  }
}

// Line 10: o += p v, where no query sees NaN and infinities of hidden keys, as in forward.metal.
template <bool EDGE, bool MASKED>
METAL_FUNC void accumulate_pv(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread State& state,
    BlockKeys keys,
    int first_key,
    Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    int key = key_of(first_key, n, lane.row, 0);
    bool exists = !EDGE || key < keys.seqlen;
    if (EDGE) key = min(key, keys.seqlen - 1);
    device const T* row = keys.v.at(key);
    Operand v[DV_FRAGMENTS];
    if (EDGE) clear(v);
    if (exists) SliceV::load_right(v, row, state.slice, lane);
    if (EDGE || MASKED) {
      float nan_if_nonfinite = 0.0f;
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f)
        nan_if_nonfinite += 0.0f * float(v[f].thread_elements()[0]) + 0.0f * float(v[f].thread_elements()[1]);
      if (simd_any(nan_if_nonfinite != 0.0f)) {
        UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
          Operand nonfinite;  // 1 where v is not finite
          UNROLL for (int e = 0; e < 2; ++e) {
            bool is_nonfinite = !isfinite(float(v[f].thread_elements()[e]));
            nonfinite.thread_elements()[e] = T(is_nonfinite ? 1.0f : 0.0f);
            if (is_nonfinite) v[f].thread_elements()[e] = T(0.0f);
          }
          UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
            Operand visible;  // 1 where the query sees the key
            UNROLL for (int e = 0; e < 2; ++e)
              visible.thread_elements()[e] = T(s[r][n].thread_elements()[e] == -INFINITY ? 0.0f : 1.0f);
            Accumulator nonfinite_seen = zeros();
            simdgroup_multiply_accumulate(nonfinite_seen, visible, nonfinite, nonfinite_seen);
            UNROLL for (int e = 0; e < 2; ++e)
              if (nonfinite_seen.thread_elements()[e] > 0.0f) state.o[r][f].thread_elements()[e] = NAN;
          }
        }
      }
    }
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f)
        simdgroup_multiply_accumulate(state.o[r][f], p[r][n], v[f], state.o[r][f]);
  }
}

// Lines 9 and 10 for a block whose s is there, or lines 8 to 10 where a simdgroup has it by itself.
template <bool EDGE, bool MASKED>
METAL_FUNC void attend_block(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread State& state,
    BlockKeys keys,
    Scoring scoring,
    MaskTile mask_tile,
    int first_key,
    Lane lane) {
  Operand p[ROW_FRAGMENTS][KEY_FRAGMENTS];
  if (SLICES == 1) compute_qk<EDGE>(s, state, keys, first_key, lane);
  online_softmax<EDGE, MASKED>(s, p, state, scoring, mask_tile, first_key, keys.seqlen, lane);
  accumulate_pv<EDGE, MASKED>(s, p, state, keys, first_key, lane);
}

// Chooses the code for one block, as in forward.metal.
METAL_FUNC void dispatch_block(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    bool altered,
    thread State& state,
    BlockKeys keys,
    Scoring scoring,
    VisibleRange range,
    int first_key,
    Lane lane) {
  MaskTile mask_tile;
  bool inner = range.contains(first_key, KEYS);
#if HAS_MASK
  if (altered) mask_tile.load(!inner, scoring, state.first_row, first_key, keys.seqlen, lane);
#endif
  if (inner && !(HAS_MASK && altered)) {
    attend_block<false, false>(s, state, keys, scoring, mask_tile, first_key, lane);
  } else if (HAS_MASK && inner) {
    attend_block<false, HAS_MASK != 0>(s, state, keys, scoring, mask_tile, first_key, lane);
  } else {
    attend_block<true, HAS_MASK != 0>(s, state, keys, scoring, mask_tile, first_key, lane);
  }
}

// A round of a threadgroup whose units are several simdgroups. All come here, and those that are `active` have a block.
METAL_FUNC void round_of_slices(
    threadgroup float2* shared,
    bool active,
    bool altered,
    thread State& state,
    Keys all_keys,
    Scoring scoring,
    VisibleRange range,
    int first_key,
    int simdgroup,
    ushort index) {
  Lane lane = lane_of(index);
  Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
  BlockKeys keys = keys_of_block(all_keys, active ? first_key : 0, index);
  if (active) {
    if (range.contains(first_key, KEYS)) {
      compute_qk<false>(s, state, keys, first_key, lane);
    } else {
      compute_qk<true>(s, state, keys, first_key, lane);
    }
    give_slice(shared, s, simdgroup, index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (active) {
    add_slices(shared, s, simdgroup / SLICES, index);
    dispatch_block(s, altered, state, keys, scoring, range, first_key, lane);
  }
}

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_decode(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int unit = simdgroup / SLICES;
  int splits = int(params[SPLITS]), tiles = int(groups.x) / splits;
  int split = int(group.x) / tiles;
  int first_head = int(group.y) * HEADS_IN_TILE;
  Tile tile = tile_of(int(group.x) % tiles, int(group.z), ROWS, in);
  Sequence sequence = tile.sequence;
  Scoring scoring = scoring_of(sequence, first_head, in);
  int rows = sequence.seqlen_q * HEADS_IN_TILE, first_row = tile.index * ROWS;

  // Line 6: the blocks of keys that these queries see, and which of them are this split's.
  VisibleRange range = key_range_of_rows(scoring, first_row, rows, sequence.seqlen_k);
  if (first_row >= rows) range.visible_end = range.visible_begin;
  VisibleRange part = part_of(range, splits, split);
#if HAS_PARTIAL_O
  if (split >= parts_of(range, splits)) return;
#else
  if (first_row >= sequence.rows_q * HEADS_IN_TILE) return;
#endif

  // Lines 4 and 5: load q; o = 0, l = 0, m = -inf.
  State state;
  state.first_row = first_row;
  state.slice = simdgroup % SLICES;
  device const T* q_sequence = q + sequence.batch * params[Q_BATCH] + sequence.first_q * params[Q_ROW];
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = max(0, min(first_row + 8 * r + lane.row, rows - 1));
    int head = first_head + row % HEADS_IN_TILE;
    if (first_row < rows && unit == 0)
      SliceD::load_left(
          state.q[r], q_sequence + query_of(row) * params[Q_ROW] + head * params[Q_HEAD], state.slice, scoring.sign, lane);
    UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) state.o[r][f] = zeros();
    state.m[r] = -INFINITY;
    state.l[r] = 0.0f;
#if HAS_ALIBI_SLOPES
    state.slope[r] = in.alibi_slopes[sequence.batch * params[ALIBI_BATCH] + head];
#endif
  }

  threadgroup float2 shared[SHARED * 32];
  share_q(shared, state, unit, index);

  Keys keys = keys_of(sequence, first_head, k, v, in);
#if HAS_MASK
  for (int run = part.visible_begin; run < part.visible_end; run += BLOCKS_PER_RUN * ROUND) {
    BlockFlags flags = scan_mask(part, scoring, first_row, run + unit * KEYS, ROUND, keys.seqlen, lane);
#if SLICES > 1
    for (int block = 0; block < BLOCKS_PER_RUN && run + block * ROUND < part.visible_end; ++block)
      round_of_slices(
          shared + block % 2 * (EXCHANGED / 2) * 32, flags.visible >> block & 1, flags.altered >> block & 1, state, keys, scoring,
          part, run + block * ROUND + unit * KEYS, simdgroup, index);
#else
    for (; flags.visible; flags.visible &= flags.visible - 1) {
      uint block = ctz(flags.visible);
      Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
      int first_key = run + int(block) * ROUND + unit * KEYS;
      dispatch_block(
          s, flags.altered >> block & 1, state, keys_of_block(keys, first_key, index), scoring, part, first_key, lane);
    }
#endif
  }
#elif SLICES > 1
  int turn = 0;
  for (int first_key = part.visible_begin + unit * KEYS; first_key - unit * KEYS < part.visible_end; first_key += ROUND) {
    round_of_slices(
        shared + turn * (EXCHANGED / 2) * 32, first_key < part.visible_end, false, state, keys, scoring, part, first_key,
        simdgroup, index);
    turn = 1 - turn;
  }
#else
  for (int first_key = part.visible_begin + unit * KEYS; first_key < part.visible_end; first_key += ROUND) {
    Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
    dispatch_block(s, false, state, keys_of_block(keys, first_key, index), scoring, part, first_key, lane);
  }
#endif
  merge_units(shared, state, scoring, unit, index);
  if (unit > 0) return;

  // Lines 12 to 15: o / l, and the log-sum-exp m + log(l). A query that saw no key has l = 0: zeros and -inf. Padding rows get the
  // same; their state is garbage. Where keys are split, m, l and o as they are, for combine.metal: the log-sum-exp alone would lose
  // l where m is large.
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = first_row + 8 * r + lane.row;
    int query = query_of(row), head = first_head + row % HEADS_IN_TILE;
    float l = row_sum(state.l[r]);
#if HAS_PARTIAL_O
    long partial_row = split * params[PARTIAL_ROWS] + partial_row_of(sequence, query, head, int(groups.y) * HEADS_IN_TILE, in);
    if (row < rows) {
      SliceV::store(partial_o + partial_row * PARTIAL_WIDTH, state.o[r], state.slice, 1.0f, lane);
      if (state.slice == 0 && lane.column == 0) partial_m_l[partial_row] = float2(state.m[r], l);
    }
#else
    RowStatistics statistics = statistics_of(state.m[r], l, scoring, head, in);
    if (query < sequence.rows_q) {
      bool is_query = row < rows;
      if (!is_query) UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) state.o[r][f] = zeros();
      float factor = statistics.l > 0.0f ? statistics.rescale / statistics.l : 0.0f;
      device T* to = out + sequence.batch * params[OUT_BATCH] + (sequence.first_q + query) * params[OUT_ROW] + head * params[OUT_HEAD];
      SliceV::store(to, state.o[r], state.slice, factor, lane);
#if HAS_LSE
      if (state.slice == 0 && lane.column == 0)
        lse[sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD] + query] =
            is_query ? log_sum_exp(statistics) : -INFINITY;
#endif
    }
#endif
  }
}
