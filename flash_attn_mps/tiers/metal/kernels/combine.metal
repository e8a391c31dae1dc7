// The output from what decode.metal has of each split's keys: with M the largest m of a row,
//   o = sum(exp(m - M) o) / sum(exp(m - M) l)  and  log-sum-exp = M + log(sum(exp(m - M) l)).
// A threadgroup for each row; its simdgroups take the splits in turn.

constant constexpr int SIMDGROUPS = 8;
constant constexpr int COLUMNS = (PARTIAL_WIDTH + 31) / 32;  // of a lane

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
kernel void attention_combine(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Tile tile = tile_of(int(group.x) / ROWS, int(group.z), ROWS, in);
  Sequence sequence = tile.sequence;
  int first_row = tile.index * ROWS, row = first_row + int(group.x) % ROWS;
  int query = query_of(row), head = int(group.y) * HEADS_IN_TILE + row % HEADS_IN_TILE;
  if (query >= sequence.rows_q) return;
  Scoring scoring = scoring_of(sequence, head, in);
  int rows = sequence.seqlen_q * HEADS_IN_TILE, splits = int(params[SPLITS]);
  bool is_query = row < rows;
  int parts = is_query ? parts_of(key_range_of_rows(scoring, first_row, rows, sequence.seqlen_k), splits) : 0;
  long first = partial_row_of(sequence, query, head, int(groups.y) * HEADS_IN_TILE, in), step = params[PARTIAL_ROWS];

  float m = -INFINITY;
  for (int part = index; part < parts; part += 32) m = max(m, partial_m_l[part * step + first].x);
  m = simd_max(m);
  float base = m == -INFINITY ? 0.0f : m;

  float l = 0.0f, o[COLUMNS];
  for (int c = 0; c < COLUMNS; ++c) o[c] = 0.0f;
  _Pragma("clang loop unroll_count(4)") for (int part = simdgroup; part < parts; part += SIMDGROUPS) {  // loads ahead of their use
    float2 m_l = partial_m_l[part * step + first];
    float rescale = exp_of_difference(m_l.x, base, scoring);
    l += rescale * m_l.y;
    device const float* from = partial_o + (part * step + first) * PARTIAL_WIDTH;
    for (int c = 0; c < COLUMNS; ++c)
      if (32 * c + index < HEAD_DIM_V) o[c] += rescale * from[32 * c + index];
  }

  threadgroup float shared_l[SIMDGROUPS], shared_o[SIMDGROUPS][COLUMNS][32];
  shared_l[simdgroup] = l;
  for (int c = 0; c < COLUMNS; ++c) shared_o[simdgroup][c][index] = o[c];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  l = 0.0f;
  for (int i = 0; i < SIMDGROUPS; ++i) l += shared_l[i];
  RowStatistics statistics = statistics_of(m, l, scoring, head, in);
  float factor = is_query && statistics.l > 0.0f ? statistics.rescale / statistics.l : 0.0f;
  device T* to = out + sequence.batch * params[OUT_BATCH] + (sequence.first_q + query) * params[OUT_ROW] + head * params[OUT_HEAD];
  for (int c = simdgroup; c < COLUMNS; c += SIMDGROUPS) {
    float sum = 0.0f;
    for (int i = 0; i < SIMDGROUPS; ++i) sum += shared_o[i][c][index];
    if (32 * c + index < HEAD_DIM_V) to[32 * c + index] = T(sum * factor);
  }
#if HAS_LSE
  if (simdgroup == 0 && index == 0)
    lse[sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD] + query] =
        is_query ? log_sum_exp(statistics) : -INFINITY;
#endif
}
