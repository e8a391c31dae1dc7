// dq: a simdgroup holds queries and their gradients of the output, and lets the keys pass that they see: backward.metal.
// BUFFERS, INPUTS and the names in params[...] are declared by the host: QUERIES in backward.py.

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
kernel void attention_backward_queries(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int head = int(group.y);
  // As in the forward pass: the last queries see most keys, and come first.
  int tile_index = HAS_WINDOW_RIGHT && !HAS_CU_SEQLENS_Q ? int(groups.x - 1 - group.x) : int(group.x);
  Tile tile = tile_of(tile_index, int(group.z), HELD * SIMDGROUPS, in);
  Sequence sequence = tile.sequence;
  int group_first_row = tile.index * HELD * SIMDGROUPS;
  if (group_first_row >= sequence.rows_q) return;
  bool has_queries = group_first_row < sequence.seqlen_q;  // of the group: else its rows are zeroed

  Held held;
  held.first = group_first_row + simdgroup * HELD;
  held.count = sequence.seqlen_q;
  int last_row = min(held.first + HELD, sequence.seqlen_q) - 1;
  Scoring scoring = scoring_of(sequence, head, in);
  DECLARE_MEMORY
#if HAS_MASK && STAGED
  held.turn = 0;
#endif
  if (has_queries) {
    Rows q_rows = q_rows_of(sequence, head, q, in), do_rows = do_rows_of(sequence, head, dout, in);
    hold(held, q_rows, do_rows, scoring.sign, memory, simdgroup, lane);
    device const float4* terms_of_head = terms_of(sequence, head, terms, in);
    UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r)
      UNROLL for (int i = 0; i < 2; ++i)
        held.terms[r][i] = terms_of_head[min(held.first + 8 * r + lane.column + i, sequence.seqlen_q - 1)];
  }

  Keys keys = keys_of(sequence, head, k, v, in);
  VisibleRange range = key_range_of(scoring, held.first, last_row, sequence.seqlen_k);
  int group_last_row = min(group_first_row + HELD * SIMDGROUPS, sequence.seqlen_q) - 1;
  VisibleRange group_range = key_range_of(scoring, group_first_row, group_last_row, sequence.seqlen_k);
  if (!has_queries) group_range.visible_end = 0;
  if (held.first >= sequence.seqlen_q) range.visible_end = 0;
  Passing<Rows, Rows> passing;
  passing.c = keys.k;
  passing.e = keys.v;
  passing.count = sequence.seqlen_k;
  Dropout dropout = dropout_of(sequence, head, in);
  pass_all(held, passing, scoring, dropout, range, group_range, memory, simdgroup, lane);

  device T* dq_head = dq + sequence.batch * params[DQ_BATCH] + sequence.first_q * params[DQ_ROW] + head * params[DQ_HEAD];
  float factor = scoring.sign * scoring.scale;
#if HAS_DROPOUT
  factor *= dropout.scale;
#endif
  store_rows<SlabD>(held.da, dq_head, params[DQ_ROW], held.first, sequence.seqlen_q, sequence.rows_q, factor, lane);
}
