// What the backward pass must know of a query before it computes probabilities: `terms`, (m, log2 l, delta, dsink), with which
//
//   p = exp2((s - m) * exp2_scale - log2 l)   and   ds = p (dp - delta),   delta = rowsum(do o) - dlse
//
// and dsink is what the query gives to the gradient of its head's sink. s is a score as the kernels of the backward pass have it.
// Under dropout dp and do count where kept, and everything is what it should be over Dropout.scale until it is stored.
//
// An ordinary query has m = 0 and the log-sum-exp for log2 l. But half an ulp of a log-sum-exp of 1e6 is 0.03, and one of a row
// whose every key has the least finite number added holds no trace of l. So a query whose log-sum-exp is large walks its keys
// once more, finds m and l by the very products that the other kernels compute, and looks at the log-sum-exp only for what it says
// of keys that are not here.
//
// BUFFERS, INPUTS and the names in params[...] are declared by the host: ROWS in backward.py.

constant constexpr float EPSILON = 1.1920929e-7f;

// Of the keys that a query sees: the maximum of their scores, the sum of exp(s - m), and the largest sum of magnitudes |q| |k|
// that a score is the sum of, by which it is rounded.
struct Walk {
  float m;
  float l;
  float magnitude;
};

// x += q k^T, and magnitudes += |q| |k|^T, slab by slab.
template <typename S>
struct Score {
  METAL_FUNC static void run(
      thread Accumulator& x, thread Accumulator& magnitudes, device const T* row, device const T* key0, device const T* key1,
      float sign, Lane lane) {
    Operand left[S::W], right[S::W];
    S::load_right_slab(left, row, lane);
    S::load_transposed_slab(right, key0, key1, sign, lane);
    UNROLL for (int f = 0; f < S::W; ++f) {
      simdgroup_multiply_accumulate(x, left[f], right[f], x);
      UNROLL for (int i = 0; i < 2; ++i) {
        left[f].thread_elements()[i] = T(abs(float(left[f].thread_elements()[i])));
        right[f].thread_elements()[i] = T(abs(float(right[f].thread_elements()[i])));
      }
      simdgroup_multiply_accumulate(magnitudes, left[f], right[f], magnitudes);
    }
    Score<typename S::Rest>::run(x, magnitudes, row, key0, key1, sign, lane);
  }
};
template <int DIM, int ALIGNED, int FIRST>
struct Score<Slab<DIM, ALIGNED, FIRST, END>> {
  METAL_FUNC static void run(
      thread Accumulator&, thread Accumulator&, device const T*, device const T*, device const T*, float, Lane) {}
};

// The walk of this lane's row, one of the eight from first_row on.
METAL_FUNC Walk walk(device const T* q_row, Keys keys, Scoring scoring, int first_row, int last_row, Lane lane) {
  Walk walk;
  walk.m = -INFINITY;
  walk.l = walk.magnitude = 0.0f;
  VisibleRange range = key_range_of(scoring, first_row, last_row, keys.seqlen);
  for (int first_key = range.visible_begin; first_key < range.visible_end; first_key += 8) {
    int key = first_key + lane.column;
    Accumulator x = zeros(), magnitudes = zeros();
    Score<SlabD>::run(
        x, magnitudes, q_row, keys.k.at(min(key, keys.seqlen - 1)), keys.k.at(min(key + 1, keys.seqlen - 1)), scoring.sign, lane);
    float m = -INFINITY, s[2];
    UNROLL for (int i = 0; i < 2; ++i) {
      int row = min(first_row + lane.row, scoring.seqlen_q - 1);
      s[i] = score_mod(x.thread_elements()[i], scoring, row, key + i);
#if HAS_MASK
      s[i] = apply_mask(s[i], *scoring.mask_at(row, min(key + i, keys.seqlen - 1)));
#endif
      if (!is_visible(scoring, row, key + i, keys.seqlen)) s[i] = -INFINITY;
      m = max(m, s[i]);
      if (s[i] != -INFINITY) walk.magnitude = max(walk.magnitude, magnitudes.thread_elements()[i]);
    }
    m = max(row_max(m), walk.m);
    float base = m == -INFINITY ? 0.0f : m;
    walk.l = walk.l * exp_of_difference(walk.m, base, scoring) + exp_of_difference(s[0], base, scoring) +
             exp_of_difference(s[1], base, scoring);
    walk.m = m;
  }
  walk.l = row_sum(walk.l);
  walk.magnitude = row_max(walk.magnitude);
  return walk;
}

// Its m and log2 l, and the logarithm of the sink's probability, all to base 2.
METAL_FUNC float3 terms_of(Walk walk, float lse, Scoring scoring, int head, Inputs in) {
  RowStatistics statistics = statistics_of(walk.m, walk.l, scoring, head, in);
  float largest = walk.magnitude * scoring.scale;
#if HAS_SOFTCAP
  largest = min(largest, scoring.softcap);
#endif
  // How far apart the two may be and mean the same: whoever gave the other rounded its scores otherwise. Under a mask they do.
  float beyond = lse - log_sum_exp(statistics);
  if (HAS_MASK || abs(beyond) <= 8.0f * EPSILON * (largest + abs(lse))) beyond = 0.0f;
  float log2_l = log2(statistics.l) + beyond * LOG2E;
  float of_sink = -INFINITY;
#if HAS_SINKS
  of_sink = (in.sinks[head] - statistics.m) * LOG2E - log2_l;
#endif
  bool sees_nothing = walk.m == -INFINITY;
  return float3(sees_nothing ? 0.0f : walk.m, sees_nothing ? INFINITY : log2_l - log2(statistics.rescale), of_sink);
}

[[max_total_threads_per_threadgroup(BOUND(32 * SIMDGROUPS))]]
kernel void attention_backward_rows(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort index [[thread_index_in_simdgroup]]) {
  Inputs in = INPUTS;
  Lane lane = lane_of(index);
  int head = int(group.y);
  Tile tile = tile_of(int(group.x), int(group.z), HELD * SIMDGROUPS, in);
  Sequence sequence = tile.sequence;
  Scoring scoring = scoring_of(sequence, head, in);
  int first_row = (tile.index * SIMDGROUPS + simdgroup) * HELD;
  if (first_row >= sequence.rows_q) return;
  int row = first_row + lane.row, inside = min(row, sequence.seqlen_q - 1);
  long row_of_head = sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD];

  float4 result = float4(0.0f, INFINITY, 0.0f, 0.0f);
  if (first_row < sequence.seqlen_q) {
    device const T* q_row = q + sequence.batch * params[Q_BATCH] + (sequence.first_q + inside) * params[Q_ROW] + head * params[Q_HEAD];
    device const T* out_row =
        out + sequence.batch * params[OUT_BATCH] + (sequence.first_q + inside) * params[OUT_ROW] + head * params[OUT_HEAD];
    device const T* do_row =
        dout + sequence.batch * params[DOUT_BATCH] + (sequence.first_q + inside) * params[DOUT_ROW] + head * params[DOUT_HEAD];
    float lse_of_row = lse[row_of_head + inside];
    float delta = row_sum(SlabV::dot(do_row, out_row, lane));
#if HAS_DLSE
    delta -= dlse[row_of_head + inside];
#endif
#if HAS_DROPOUT
    float scale = dropout_of(sequence, head, in).scale;
#else
    float scale = 1.0f;
#endif
    float3 logarithms = float3(0.0f, lse_of_row * LOG2E, -INFINITY);
#if HAS_SINKS
    logarithms.z = (in.sinks[head] - lse_of_row) * LOG2E;
#endif
    if (lse_of_row == INFINITY) logarithms.y = NAN;  // an infinite score: so is the output
    bool is_large = abs(lse_of_row) >= as_float(params[LARGE_LSE]) && abs(lse_of_row) < INFINITY;
    if (simd_any(is_large)) {
      int last_row = min(first_row + HELD, sequence.seqlen_q) - 1;
      Walk walked = walk(q_row, keys_of(sequence, head, k, v, in), scoring, first_row, last_row, lane);
      if (is_large) logarithms = terms_of(walked, lse_of_row, scoring, head, in);
    }
    // A row that does not exist, or whose sink is -inf and that sees nothing, has a log-sum-exp of -inf.
    bool is_row = row < sequence.seqlen_q && lse_of_row != -INFINITY;
    float of_sink = is_row ? exp2(logarithms.z) : 0.0f;
    if (is_row) result = float4(logarithms.x, logarithms.y, delta / scale, of_sink == 0.0f ? 0.0f : -of_sink * delta);
  }
  if (lane.column == 0 && row < sequence.rows_q) terms[row_of_head + row] = result;
}
