// The forward pass: FlashAttention-2, algorithm 1 (Dao, 2023, https://arxiv.org/abs/2307.08691). "Line 8" and so on are its
// lines, and q, k, v, o, s, p, m, l are its letters.
//
// A simdgroup takes ROWS queries (the paper's block i) of one head through the keys that they see, KEYS at a time (block j).
// s, p and o never leave its registers. What a score is, and how exp(s - m) is rounded: scoring.metal.
// BUFFERS, INPUTS and the names in params[...] are declared by the host: FORWARD in simdgroup.py.

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
#if EXCHANGES
  threadgroup Exchange exchanges[SIMDGROUPS];
  state.products.exchange = exchanges + simdgroup;
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
    if (is_needed) flags = scan_mask<false>(range, scoring, anew(state.first_row), run, KEYS, keys.seqlen, lane);
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
    BlockFlags flags = scan_mask<false>(range, scoring, anew(state.first_row), run, KEYS, keys.seqlen, lane);
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
  int first_row = anew(state.first_row);
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = first_row + 8 * r + lane.row;
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
