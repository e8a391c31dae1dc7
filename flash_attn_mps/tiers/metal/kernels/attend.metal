// Blocks of keys passing a simdgroup's rows: lines 7 to 10 of FlashAttention-2's algorithm 1, for forward.metal and decode.metal,
// whose names it has. What a simdgroup holds and how it reads keys is its kernel's: `State`, in tile.metal or slices.metal.

// Line 8: s = q k^T. EDGE: there may be fewer keys than the block has.
template <bool EDGE, typename AnyKeys>
METAL_FUNC void compute_qk(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State& state, AnyKeys keys, int first_key, Lane lane) {
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) s[r][n] = zeros();
  state.add_qk<EDGE>(s, keys, first_key, lane);
}

// Line 9, and of line 10 the rescaling of o: scales and masks s, then
//   m_new = max(m, rowmax(s)),  p = exp(s - m_new),  l = exp(m - m_new) l + rowsum(p),  o = exp(m - m_new) o.
// Where keys may be hidden, `visible` tells which scores are not (hidden.metal).
template <bool EDGE, bool MASKED>
METAL_FUNC void online_softmax(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread ushort (&visible)[ROW_FRAGMENTS],
    thread State& state,
    Scoring scoring,
    MaskTile mask_tile,
    int first_row,
    int first_key,
    int seqlen_k,
    Lane lane) {
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
    // Scale, soft-cap, ALiBi, window, mask.
    int query = query_of(first_row + 8 * r + lane.row);
    Scoring of_row = state.scoring_of_row(scoring, r);
    float m = -INFINITY;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL for (int e = 0; e < 2; ++e) {
        int key = key_of(first_key, n, lane.column, e);
        float x = s[r][n].thread_elements()[e];
#if SCORES_ARE_SCALED
        x = score_mod(x, of_row, min(query, scoring.seqlen_q - 1), EDGE ? min(key, seqlen_k - 1) : key);
#endif
        if (EDGE && !MASKED && !is_visible(scoring, query, key, seqlen_k)) x = -INFINITY;
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
    if (EDGE || MASKED) {
      visible[r] = 0;
      UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n)
        UNROLL for (int e = 0; e < 2; ++e)
          visible[r] |= ushort(s[r][n].thread_elements()[e] == -INFINITY ? 0 : 1 << (2 * n + e));
    }
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

// Lines 7 to 10 for the block of keys from `first_key` on. EDGE: the sequence's end or a side of the window lies in it.
// MASKED: the mask is applied, in which what lies beyond an edge is hidden too.
template <bool EDGE, bool MASKED, typename AnyKeys>
METAL_FUNC void attend_block(thread State& state, AnyKeys keys, Scoring scoring, int first_key, Lane lane) {
  Accumulator s[ROW_FRAGMENTS][KEY_FRAGMENTS];
  Operand p[ROW_FRAGMENTS][KEY_FRAGMENTS];
  ushort visible[ROW_FRAGMENTS];
  bool needs_rows = EDGE || MASKED || HAS_ALIBI_SLOPES || HAS_DROPOUT;
  int first_row = needs_rows ? anew(state.first_row) : state.first_row;
  state.kept.move_to(first_row, first_key, lane);  // before s takes registers
  if (!state.take_s(s, lane)) compute_qk<EDGE>(s, state, keys, first_key, lane);
  MaskTile mask_tile;
#if HAS_MASK
  if (MASKED) mask_tile.load(EDGE, scoring, first_row, first_key, keys.seqlen, lane);  // when k has left its registers
#endif
  online_softmax<EDGE, MASKED>(s, p, visible, state, scoring, mask_tile, first_row, first_key, keys.seqlen, lane);
  state.add_block_pv<EDGE, EDGE || MASKED>(p, visible, keys, first_key, lane);
}

// Chooses the code for one block, with no more tests in it than the block needs: a test inside the loops over fragments would
// keep the compiler from moving loads ahead of it. `altered`: the mask changes scores of this block, so it must be read.
template <typename AnyKeys>
METAL_FUNC void dispatch_block(
    bool altered, thread State& state, AnyKeys keys, Scoring scoring, VisibleRange range, int first_key, Lane lane) {
  bool inner = range.contains(first_key, KEYS);
  if (inner && !(HAS_MASK && altered)) {
    attend_block<false, false>(state, keys, scoring, first_key, lane);
  } else if (HAS_MASK && inner) {
    attend_block<false, HAS_MASK != 0>(state, keys, scoring, first_key, lane);
  } else {
    attend_block<true, HAS_MASK != 0>(state, keys, scoring, first_key, lane);
  }
}
