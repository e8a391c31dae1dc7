// Products with values that some queries may not see.

// Line 10 of FlashAttention-2's algorithm 1 for one fragment of keys and some of the head dim: o += p v. A hidden key has p = 0,
// but 0 * NaN is NaN, and memory that no query sees may hold anything. So where keys may be hidden, at an edge or by a mask,
// NaN and infinities in v are replaced by 0, and NaN is put into o for those queries alone that see them.

template <int FIRST, int COUNT, int ALL>
METAL_FUNC void spread_nonfinite(
    thread Accumulator (&o)[ROW_FRAGMENTS][ALL], thread ushort (&visible)[ROW_FRAGMENTS], thread Operand (&v)[COUNT], int n) {
  UNROLL for (int f = 0; f < COUNT; ++f) {
    Operand nonfinite;  // 1 where v is not finite
    UNROLL for (int e = 0; e < 2; ++e) {
      bool is_nonfinite = !isfinite(float(v[f].thread_elements()[e]));
      nonfinite.thread_elements()[e] = T(is_nonfinite ? 1.0f : 0.0f);
      if (is_nonfinite) v[f].thread_elements()[e] = T(0.0f);
    }
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      Operand sees;  // 1 where the query sees the key
      UNROLL for (int e = 0; e < 2; ++e) sees.thread_elements()[e] = T(is_seen(visible[r], n, e) ? 1.0f : 0.0f);
      Accumulator nonfinite_seen = zeros();  // how many of them each query sees, in each column
      simdgroup_multiply_accumulate(nonfinite_seen, sees, nonfinite, nonfinite_seen);
      UNROLL for (int e = 0; e < 2; ++e)
        if (nonfinite_seen.thread_elements()[e] > 0.0f) o[r][FIRST + f].thread_elements()[e] = NAN;
    }
  }
}

// v: fragments FIRST and up of the head dim, for fragment n of a block's keys. HIDDEN: some of the keys may be hidden.
template <bool HIDDEN, int FIRST, int COUNT, int ALL>
METAL_FUNC void add_pv(
    thread Accumulator (&o)[ROW_FRAGMENTS][ALL],
    thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    thread ushort (&visible)[ROW_FRAGMENTS],
    thread Operand (&v)[COUNT],
    int n) {
  if (HIDDEN) {
    float nan_if_nonfinite = 0.0f;
    UNROLL for (int f = 0; f < COUNT; ++f)
      nan_if_nonfinite += 0.0f * float(v[f].thread_elements()[0]) + 0.0f * float(v[f].thread_elements()[1]);
    if (simd_any(nan_if_nonfinite != 0.0f)) spread_nonfinite<FIRST>(o, visible, v, n);
  }
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
    UNROLL for (int f = 0; f < COUNT; ++f)
      simdgroup_multiply_accumulate(o[r][FIRST + f], p[r][n], v[f], o[r][FIRST + f]);
}
