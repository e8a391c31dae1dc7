// dk and dv: a simdgroup holds keys and their values, and lets the queries pass that see them, of all heads that share the
// keys: backward.metal. It makes those of the two gradients that have a buffer.
// BUFFERS, INPUTS and the names in params[...] are declared by the host: KEYS in backward.py.

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
kernel void attention_backward_keys(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int heads = int(params[HEADS_TOGETHER]);  // query heads, one after the other, from first_head on
  int first_head = int(group.y) * heads;
  // As tile_of. Rows behind the last sequence count as its own, so that somebody writes them.
  int batch = int(group.z), tile_index = int(group.x), rows = int(params[TOTAL_K]);
#if HAS_CU_SEQLENS_K
  batch = packed_sequence_of(tile_index, HELD * SIMDGROUPS, 1, in.cu_seqlens_k, int(params[BATCH]));
  tile_index -= in.cu_seqlens_k[batch] / (HELD * SIMDGROUPS) + batch;
  rows = (batch == int(params[BATCH]) - 1 ? rows : in.cu_seqlens_k[batch + 1]) - in.cu_seqlens_k[batch];
#endif
  Sequence sequence = sequence_of(batch, in);
  int group_first_key = tile_index * HELD * SIMDGROUPS;
  if (group_first_key >= rows) return;
  bool has_keys = group_first_key < sequence.seqlen_k;  // of the group: else its rows are zeroed

  Held held;
  held.first = group_first_key + simdgroup * HELD;
  held.count = sequence.seqlen_k;
  int last_key = min(held.first + HELD, sequence.seqlen_k) - 1;
  Keys keys = keys_of(sequence, first_head, k, v, in);
  Scoring scoring = scoring_of(sequence, first_head, in);
  DECLARE_MEMORY
#if HAS_MASK && STAGED
  held.turn = 0;
#endif
  if (has_keys) hold(held, keys.k, keys.v, scoring.sign, memory, simdgroup, lane);

  // Under a causal mask the first keys are seen by most queries, and come first as they are.
  VisibleRange range = query_range_of(scoring, held.first, last_key, sequence.seqlen_q);
  int group_last_key = min(group_first_key + HELD * SIMDGROUPS, sequence.seqlen_k) - 1;
  VisibleRange group_range = query_range_of(scoring, group_first_key, group_last_key, sequence.seqlen_q);
  if (!has_keys) group_range.visible_end = 0;
  if (held.first >= sequence.seqlen_k) range.visible_end = 0;
  for (int head = first_head; head < first_head + heads; ++head) {
#if HAS_ALIBI_SLOPES || HAS_MASK
    scoring = scoring_of(sequence, head, in);
#endif
    Passing<Rows, Rows> passing = queries_of(sequence, head, q, dout, terms, in);
    pass_all(held, passing, scoring, dropout_of(sequence, head, in), range, group_range, memory, simdgroup, lane);
  }
  float factor = 1.0f;
#if HAS_DROPOUT
  factor = dropout_of(sequence, first_head, in).scale;
#endif
#if HAS_DK
  auto dk_head = dk + sequence.batch * params[DK_BATCH] + sequence.first_k * params[DK_ROW] + int(group.y) * params[DK_HEAD];
  store_rows<SlabD>(
      held.da, dk_head, params[DK_ROW], held.first, sequence.seqlen_k, rows, scoring.sign * scoring.scale * factor, lane);
#endif
#if HAS_DV
  auto dv_head = dv + sequence.batch * params[DV_BATCH] + sequence.first_k * params[DV_ROW] + int(group.y) * params[DV_HEAD];
  store_rows<SlabV>(held.db, dv_head, params[DV_ROW], held.first, sequence.seqlen_k, rows, factor, lane);
#endif
}
