// Blocks of keys passing a simdgroup's rows: lines 7 to 10 of FlashAttention-2's algorithm 1, for forward.metal and decode.metal,
// whose names it has. What a simdgroup holds and how it reads keys is its kernel's: `State`, in tile.metal or slices.metal.

// Line 8: s = q k^T. EDGE: there may be fewer keys than the block has.
template <bool EDGE, typename AnyKeys>
METAL_FUNC void compute_qk(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread State& state, AnyKeys keys, int first_key, Lane lane) {
  UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    Operand k[D_FRAGMENTS];
    state.load_k<EDGE>(k, keys, first_key, n, lane);
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
    int query = query_of(state.first_row + 8 * r + lane.row);
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
    Operand v[DV_FRAGMENTS];
    state.load_v<EDGE>(v, keys, first_key, n, lane);
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
  if (!state.take_s(s, lane)) compute_qk<EDGE>(s, state, keys, first_key, lane);
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
