// The gradient of a mask that is added: ds, summed along the axes on which the mask is one for many. A simdgroup owns HELD keys
// and eight queries of the mask's own elements, holds these keys, and lets these queries pass; along an axis on which the
// mask is one, all of them, one after the other: backward.metal. No atomics, and no memory but for the gradient.
// BUFFERS, INPUTS and the names in params[...] are declared by the host: MASK in backward_kernels.py.

// Sums over the eight lanes of a column.
METAL_FUNC float column_sum(float x) {
  x += simd_shuffle_xor(x, ushort(2));
  x += simd_shuffle_xor(x, ushort(4));
  return x + simd_shuffle_xor(x, ushort(16));
}

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
kernel void attention_backward_mask(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int batches = int(params[MASK_BATCHES]), heads = int(params[MASK_HEADS]);
  int rows = int(params[MASK_ROWS]), columns = int(params[MASK_COLUMNS]);
  int mask_batch = int(group.z) / heads, mask_head = int(group.z) % heads;
  int own_key = (int(group.x) * SIMDGROUPS + simdgroup) * HELD, own_query = int(group.y) * PASSING;
  if (own_key >= columns) return;

  Held held;
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) held.dm[r] = zeros();
  DECLARE_MEMORY
  // Where the mask hides all of the tile there is no gradient.
  bool shown = rows == 1 || columns == 1;
  device const MASK_T* own_mask = in.mask + mask_batch * params[MASK_BATCH] + mask_head * params[MASK_HEAD];
  UNROLL for (int i = 0; i < 2 * HELD_FRAGMENTS; ++i) {
    int row = min(own_query + lane.row, rows - 1), column = min(own_key + 8 * (i / 2) + lane.column + i % 2, columns - 1);
    shown = shown || float(own_mask[row * params[MASK_ROW] + column * params[MASK_COLUMN]]) != -INFINITY;
  }
  if (!simd_any(shown)) batches = 0;
  int first_batch = batches == 1 ? 0 : mask_batch, last_batch = batches == 1 ? int(params[BATCH]) : batches ? mask_batch + 1 : 0;
  int first_head = heads == 1 ? 0 : mask_head, last_head = heads == 1 ? int(params[HEADS]) : mask_head + 1;
  for (int batch = first_batch; batch < last_batch; ++batch) {
    Sequence sequence = sequence_of(batch, in);
    held.count = sequence.seqlen_k;
    int end_key = columns == 1 ? sequence.seqlen_k : min(own_key + HELD, sequence.seqlen_k);
    int end_query = rows == 1 ? sequence.seqlen_q : min(own_query + PASSING, sequence.seqlen_q);
    for (int head = first_head; head < last_head; ++head) {
      Scoring scoring = scoring_of(sequence, head, in);
      Dropout dropout = dropout_of(sequence, head, in);
      Keys keys = keys_of(sequence, head, k, v, in);
      Passing<Rows, Rows> passing = queries_of(sequence, head, q, dout, terms, in);
      for (held.first = own_key; held.first < end_key; held.first += HELD) {
        VisibleRange range =
            query_range_of(scoring, held.first, min(held.first + HELD, sequence.seqlen_k) - 1, sequence.seqlen_q);
        range.visible_end = min(range.visible_end, end_query);
        if (held.first + HELD > held.count) range.full_end = range.full_begin;  // keys behind the last one are to be hidden
        int first_query = max(own_query, range.visible_begin);  // of which both are multiples of PASSING
        if (first_query >= range.visible_end) continue;
        hold(held, keys.k, keys.v, scoring.sign, memory, simdgroup, lane);
#if HAS_DROPOUT
        held.kept_first = -KEPT_PASSING;  // none yet
#endif
        for (int first = first_query; first < range.visible_end; first += PASSING)
          visit(true, held, passing, scoring, dropout, range, first, lane);
      }
    }
  }

  float factor = 1.0f;
#if HAS_DROPOUT
  factor = as_float(params[DROPOUT_SCALE]);
#endif
  if (columns == 1) {
    UNROLL for (int r = 1; r < HELD_FRAGMENTS; ++r)
      UNROLL for (int i = 0; i < 2; ++i) held.dm[0].thread_elements()[i] += held.dm[r].thread_elements()[i];
    held.dm[0].thread_elements()[0] = row_sum(held.dm[0].thread_elements()[0] + held.dm[0].thread_elements()[1]);
  }
  device MASK_T* own = dmask + (long(group.z) * rows + own_query) * columns;
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) {
    UNROLL for (int i = 0; i < 2; ++i) {
      float sum = held.dm[r].thread_elements()[i] * factor;
      if (rows == 1) sum = column_sum(sum);
      int row = own_query + lane.row, column = own_key + 8 * r + lane.column + i;
      if (row < rows && column < columns) own[long(lane.row) * columns + column] = MASK_T(sum);
    }
  }
}
