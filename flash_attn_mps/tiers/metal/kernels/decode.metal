// Few queries against many keys: FlashAttention-2's algorithm 1 as in forward.metal, whose lines are meant here too, but with
// the work cut for reading each byte of k and v once, which is all that takes time.
//
// * The HEADS_IN_TILE heads that share their keys are rows of one tile, of ROWS rows.
// * The keys are split over threadgroups (splits.metal; "Flash-Decoding", Dao, Haziza, Massa, Sizov, 2023,
//   https://pytorch.org/blog/flash-decoding) and over the UNITS of a threadgroup, which take its blocks of KEYS keys in turn.
//   Each has m, l and o of its own keys: `merge_units` puts together those of a threadgroup, combine.metal those of the splits.
// * A unit is SLICES simdgroups, each with a slice of both head dims, so that ROWS rows of q and o fit into registers: the s of
//   a slice are added up in threadgroup memory.

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
  BlockKeys keys = keys_of_block(all_keys, active ? first_key : 0, index);
  if (active) {
    Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
    if (range.contains(first_key, KEYS)) {
      compute_qk<false>(s, state, keys, first_key, lane);
    } else {
      compute_qk<true>(s, state, keys, first_key, lane);
    }
    give_s(shared, s, simdgroup, index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#if SLICES > 1
  state.unit_s = shared + simdgroup / SLICES * SLICES * S_FRAGMENTS * 32;
#endif
  if (active) dispatch_block(altered, state, keys, scoring, range, first_key, lane);
}

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
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
    state.alibi_slope[r] = in.alibi_slopes[sequence.batch * params[ALIBI_BATCH] + head];
#endif
  }

  threadgroup float2 shared[SHARED * 32];
  share_q(shared, state, unit, index);

  Keys keys = keys_of(sequence, first_head, k, v, in);
#if HAS_MASK
  for (int run = part.visible_begin; run < part.visible_end; run += BLOCKS_PER_RUN * ROUND) {
    BlockFlags flags = scan_mask<false>(part, scoring, first_row, run + unit * KEYS, ROUND, keys.seqlen, lane);
#if SLICES > 1
    for (int block = 0; block < BLOCKS_PER_RUN && run + block * ROUND < part.visible_end; ++block)
      round_of_slices(
          shared + block % 2 * (EXCHANGED / 2) * 32, flags.visible >> block & 1, flags.altered >> block & 1, state, keys, scoring,
          part, run + block * ROUND + unit * KEYS, simdgroup, index);
#else
    for (; flags.visible; flags.visible &= flags.visible - 1) {
      uint block = ctz(flags.visible);
      int first_key = run + int(block) * ROUND + unit * KEYS;
      dispatch_block(
          flags.altered >> block & 1, state, keys_of_block(keys, first_key, index), scoring, part, first_key, lane);
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
    dispatch_block(false, state, keys_of_block(keys, first_key, index), scoring, part, first_key, lane);
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
      SliceV::store(partial_o + partial_row * PARTIAL_WIDTH, state.o[r], state.slice, keys.v_descale, lane);
      if (state.slice == 0 && lane.column == 0) partial_m_l[partial_row] = float2(state.m[r], l);
    }
#else
    RowStatistics statistics = statistics_of(state.m[r], l, scoring, head, in);
    if (query < sequence.rows_q) {
      bool is_query = row < rows;
      if (!is_query) UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) state.o[r][f] = zeros();
      float factor = statistics.l > 0.0f ? keys.v_descale * statistics.rescale / statistics.l : 0.0f;
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
