// One thread for one query of one head, key by key: slow, and simple enough to check the tiled kernel against. The lines are
// those of FlashAttention-2's algorithm 1, as in forward.metal, with blocks of one query and one key.

METAL_FUNC float element(device const KV_T* row, int d) {
#if KV_FORMAT
  return float(decoded(row[d]));
#else
  return float(row[d]);
#endif
}

[[max_total_threads_per_threadgroup(BOUND(THREADS))]]
kernel void attention_scalar(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 thread_index [[thread_position_in_threadgroup]]) {
  Inputs in = INPUTS;
  int head = int(group.y);
  Tile tile = tile_of(int(group.x), int(group.z), THREADS, in);
  Sequence sequence = tile.sequence;
  Scoring scoring = scoring_of(sequence, head, in);
  Keys keys = keys_of(sequence, head, k, v, in);
  Dropout dropout = dropout_of(sequence, head, in);
  int row = tile.index * THREADS + int(thread_index.x);
  if (row >= sequence.rows_q) return;
  bool is_query = row < sequence.seqlen_q;  // else its output is zero
  device const T* query = q + sequence.batch * params[Q_BATCH] + (sequence.first_q + row) * params[Q_ROW] + head * params[Q_HEAD];

  float o[HEAD_DIM_V];  // line 5: o = 0, m = -inf, l = 0
  for (int d = 0; d < HEAD_DIM_V; ++d) o[d] = 0.0f;
  float m = -INFINITY, l = 0.0f;
  for (int key = 0; is_query && key < sequence.seqlen_k; ++key) {
    if (!is_visible(scoring, row, key, sequence.seqlen_k)) continue;
    float s = 0.0f;  // line 8: s = q k^T
    for (int d = 0; d < HEAD_DIM; ++d) s = fma(float(query[d]), element(keys.k.at(key), d), s);
    s = score_mod(s * scoring.sign, scoring, row, key);
#if HAS_MASK
    s = apply_mask(s, *scoring.mask_at(row, key));
#endif
    if (s == -INFINITY) continue;  // masked
    // Line 9: m_new = max(m, s), p = exp(s - m_new), l = exp(m - m_new) l + p
    float m_new = max(m, s);
    float rescale = exp2((m - m_new) * scoring.exp2_scale), p = exp2((s - m_new) * scoring.exp2_scale);
    l = l * rescale + p;
    m = m_new;
    if (!dropout.keeps(row, key)) p = 0.0f;  // which l does not see
    for (int d = 0; d < HEAD_DIM_V; ++d) o[d] = fma(p, element(keys.v.at(key), d), o[d] * rescale);  // line 10
  }
  // Lines 12 to 15: o / l, and m + log(l). A query that saw no key has l = 0: zeros and -inf.
  RowStatistics statistics = statistics_of(m, l, scoring, head, in);
  float factor = is_query && statistics.l != 0.0f ? keys.v_descale * statistics.rescale / statistics.l : 0.0f;  // l may be NaN
  factor = dropout.scaled(factor);
  device T* to = out + sequence.batch * params[OUT_BATCH] + (sequence.first_q + row) * params[OUT_ROW] + head * params[OUT_HEAD];
  for (int d = 0; d < HEAD_DIM_V; ++d) to[d] = T(o[d] * factor);
#if HAS_LSE
  lse[sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD] + row] =
      is_query ? log_sum_exp(statistics) : -INFINITY;
#endif
}
