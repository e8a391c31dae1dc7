// One thread for one query of one head: exact, every feature, nothing shared. For debugging.

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attention_scalar(
    device const T* q [[buffer(0)]],
    device const T* k [[buffer(1)]],
    device const T* v [[buffer(2)]],
    device T* out [[buffer(3)]],
    device float* lse [[buffer(4)]],
    constant long* p [[buffer(5)]],
    OPTIONAL_BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 thread_index [[thread_position_in_threadgroup]]) {
  Inputs in;
  in.p = p;
  TAKE_OPTIONAL_BUFFERS
  int head = int(group.y);
  Tile tile = tile_of(int(group.x), int(group.z), 32 * SIMDGROUPS, in);
  Sequence sequence = tile.sequence;
  Scoring scoring = scoring_of(sequence, head, in);
  Keys keys = keys_of(sequence, head, k, v, in);
  int row = tile.index * 32 * SIMDGROUPS + int(thread_index.x);
  if (row >= sequence.seqlen_q) return;
  device const T* query = q + sequence.batch * p[Q_BATCH] + (sequence.first_q + row) * p[Q_ROW] + head * p[Q_HEAD];

  float o[HEAD_DIM_V];
  for (int d = 0; d < HEAD_DIM_V; ++d) o[d] = 0.0f;
#if HAS_SINKS
  float m = in.sinks[head] * UNIT, l = 1.0f;
#else
  float m = -INFINITY, l = 0.0f;
#endif
  for (int key = 0; key < sequence.seqlen_k; ++key) {
    if (!is_seen(scoring, row, key, sequence.seqlen_k)) continue;
    float s = 0.0f;
    for (int d = 0; d < HEAD_DIM; ++d) s = fma(float(query[d]), float(keys.k.at(key)[d]), s);
    s = score_of(s * scoring.sign, scoring, row, key);
#if MASK_KIND
    s = masked(s, *scoring.mask_at(row, key));
#endif
    if (s == -INFINITY) continue;  // masked
    if (!SCORES_ARE_SCALED) s *= scoring.factor;
    float largest = max(m, s);
    float shrink = exp2((m - largest) * (LOG2E / UNIT)), x = exp2((s - largest) * (LOG2E / UNIT));
    l = l * shrink + x;
    m = largest;
    for (int d = 0; d < HEAD_DIM_V; ++d) o[d] = fma(x, float(keys.v.at(key)[d]), o[d] * shrink);
  }
  device T* to = out + sequence.batch * p[O_BATCH] + (sequence.first_q + row) * p[O_ROW] + head * p[O_HEAD];
  for (int d = 0; d < HEAD_DIM_V; ++d) to[d] = T(l == 0.0f ? 0.0f : o[d] / l);  // l may be NaN
#if WANT_LSE
  lse[sequence.batch * p[LSE_BATCH] + sequence.first_q + head * p[LSE_HEAD] + row] = log_sum(m, l);
#endif
}
