// The forward pass: FlashAttention-2, algorithm 1 (Dao, 2023, https://arxiv.org/abs/2307.08691). "Line 8" and so on are its
// lines, and q, k, v, o, s, p, m, l are its letters.
//
// A simdgroup takes ROWS queries (the paper's block i) of one head through the keys that they see, KEYS at a time (block j).
// s, p and o never leave its registers. What a score is, and how exp(s - m) is rounded: scoring.metal.
// BUFFERS, INPUTS and the names in params[...] are declared by the host: FORWARD in simdgroup.py.

constant constexpr int D_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int DV_FRAGMENTS = (HEAD_DIM_V + 7) / 8;

typedef Slab<HEAD_DIM, VECTOR> SlabD;
typedef Slab<HEAD_DIM_V, VECTOR_V> SlabV;

// A simdgroup's queries, and their attention over the blocks so far.
struct State {
  Operand q[ROW_FRAGMENTS][D_FRAGMENTS];
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
  int first_row;
  Kept kept;
};

// Line 8: s = q k^T. EDGE: there may be fewer keys than the block has; the last one stands for those past the end.
template <bool EDGE, typename AnyKeys>
METAL_FUNC void compute_qk(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State& state, AnyKeys keys, int first_key, Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    int key0 = key_of(first_key, n, lane.column, 0);
    int key1 = key_of(first_key, n, lane.column, 1);
    if (EDGE) {
      key0 = min(key0, keys.seqlen - 1);
      key1 = min(key1, keys.seqlen - 1);
    }
    Operand k[D_FRAGMENTS];
    SlabD::load_right_transposed(k, keys.k.at(key0), keys.k.at(key1), lane);
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      s[r][n] = zeros();
      UNROLL for (int f = 0; f < D_FRAGMENTS; ++f) simdgroup_multiply_accumulate(s[r][n], state.q[r][f], k[f], s[r][n]);
    }
  }
}

// Line 9, and of line 10 the rescaling of o: scales and masks s, then
//   m_new = max(m, rowmax(s)),  p = exp(s - m_new),  l = exp(m - m_new) l + rowsum(p),  o = exp(m - m_new) o.
// s stays behind with its scores in it, -inf where hidden.
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
    // Scale, soft-cap, ALiBi, window, mask.
    int row = state.first_row + 8 * r + lane.row;
    float m = -INFINITY;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        int key = key_of(first_key, n, lane.column, e);
        float x = s[r][n].thread_elements()[e];
#if SCORES_ARE_SCALED
        x = score_mod(x, scoring, min(row, scoring.seqlen_q - 1), EDGE ? min(key, seqlen_k - 1) : key);
#endif
        if (EDGE && !MASKED && !is_visible(scoring, row, key, seqlen_k)) x = -INFINITY;
        s[r][n].thread_elements()[e] = x;
        m = max(m, x);
      }
    }
#if HAS_MASK
    if (MASKED) {
      m = -INFINITY;
      UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
        UNROLL for (int e = 0; e < 2; ++e) {
          float x = apply_mask(s[r][n].thread_elements()[e], mask_tile.at(r, n, e));
          s[r][n].thread_elements()[e] = x;
          m = max(m, x);
        }
      }
    }
#endif
    // m_new = max(m, rowmax(s))
    m = max(row_max(m), state.m[r]);
    float base = m == -INFINITY ? 0.0f : m;  // a row that has seen nothing yet: -inf - -inf would be NaN
    // p = exp(s - m_new). Dropout takes from p, not from l.
    float sum = 0.0f;
    KeptRow kept = state.kept.row(r, first_key, lane);
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        float x = exp_of_difference(s[r][n].thread_elements()[e], base, scoring);
        sum += x;
        p[r][n].thread_elements()[e] = T(kept.at(n, e) ? x : 0.0f);
      }
    }
    // o and l by alpha = exp(m - m_new), which is 1 unless the maximum of a row has grown
    if (simd_any(m > state.m[r])) {
      float rescale = exp_of_difference(state.m[r], base, scoring);
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
        state.o[r][f].thread_elements()[0] *= rescale;
        state.o[r][f].thread_elements()[1] *= rescale;
      }
      state.l[r] *= rescale;
      state.m[r] = m;
    }
    // l += rowsum(p)
    state.l[r] += sum;
  }
}

// Line 10: o += p v. A hidden key has p = 0, but 0 * NaN is NaN, and memory that no query sees may hold anything. So where
// keys may be hidden, at an edge or by a mask, NaN and infinities in v are replaced by 0, and NaN is put into o for those
// queries alone that see them.
template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void accumulate_pv(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread State& state,
    AnyKeys keys,
    int first_key,
    Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    int key = key_of(first_key, n, lane.row, 0);
    if (EDGE) key = min(key, keys.seqlen - 1);
    Operand v[DV_FRAGMENTS];
    SlabV::load_right(v, keys.v.at(key), lane);
    if (EDGE || MASKED) {
      float nan_if_nonfinite = 0.0f;
      UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f)
        nan_if_nonfinite += 0.0f * float(v[f].thread_elements()[0]) + 0.0f * float(v[f].thread_elements()[1]);
      bool has_nonfinite = simd_any(nan_if_nonfinite != 0.0f);
      if (has_nonfinite) {
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
            Accumulator nonfinite_seen = zeros();  // how many of them each query sees, in each column
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

// Lines 7 to 10 for the block of keys from `first_key` on. EDGE: the sequence's end or a side of the window lies in it.
// MASKED: `mask_tile` is applied, in which what lies beyond an edge is hidden too.
template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void attend_block(thread State& state, AnyKeys keys, Scoring scoring, MaskTile mask_tile, int first_key, Lane lane) {
  Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
  Operand p[ROW_FRAGMENTS][KEY_FRAGMENTS];
  state.kept.move_to(state.first_row, first_key, lane);  // before s takes registers
  compute_qk<EDGE>(s, state, keys, first_key, lane);
  online_softmax<EDGE, MASKED>(s, p, state, scoring, mask_tile, first_key, keys.seqlen, lane);
  accumulate_pv<EDGE, MASKED>(s, p, state, keys, first_key, lane);
}

// Chooses the code for one block, with no more tests in it than the block needs: a test inside the loops over fragments would
// keep the compiler from moving loads ahead of it. `altered`: the mask changes scores of this block, so it must be read.
template <typename AnyKeys>
METAL_FUNC void dispatch_block(
    bool altered, thread State& state, AnyKeys keys, Scoring scoring, VisibleRange range, int first_key, Lane lane) {
  MaskTile mask_tile;
  bool inner = range.contains(first_key, KEYS);
#if HAS_MASK
  if (altered) mask_tile.load(!inner, scoring, state.first_row, first_key, keys.seqlen, lane);
#endif
  if (inner && !(HAS_MASK && altered)) {
    attend_block<false, false>(state, keys, scoring, mask_tile, first_key, lane);
  } else if (HAS_MASK && inner) {
    attend_block<false, HAS_MASK != 0>(state, keys, scoring, mask_tile, first_key, lane);
  } else {
    attend_block<true, HAS_MASK != 0>(state, keys, scoring, mask_tile, first_key, lane);
  }
}

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
  device const T* q_head = q + sequence.batch * params[Q_BATCH] + sequence.first_q * params[Q_ROW] + head * params[Q_HEAD];
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = min(state.first_row + 8 * r + lane.row, sequence.seqlen_q - 1);
    if (has_queries) SlabD::load_left(state.q[r], q_head + row * params[Q_ROW], scoring.sign, lane);
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
    if (is_needed) flags = scan_mask<false>(range, scoring, state.first_row, run, KEYS, keys.seqlen, lane);
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
    BlockFlags flags = scan_mask<false>(range, scoring, state.first_row, run, KEYS, keys.seqlen, lane);
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
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    int row = state.first_row + 8 * r + lane.row;
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
