// Which queries and keys a kernel works on, which scores count, and how a product q k becomes a score. Shared by all kernels.
//
// params[...] and Inputs are declared by the host: Parameters and OPTIONAL_BUFFERS in kernel.py. HAS_MASK and the like say
// which of the optional buffers there are; Inputs has no others.

constant constexpr float LOG2E = 1.44269504088896341f;
constant constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // the least normal number: what is less, a GPU takes for 0

// Soft-capping, ALiBi and additive masks need the scaled score. Without them a score is left as the product q k, and scaled
// only as a difference from the maximum: p = exp2((s - m) * Scoring.exp2_scale). Both are rounded before they are subtracted, in
// the same way, so that the largest p is exactly 1, however large the scores (pytorch#121558). exp2(s * scale - m * scale) with a
// fused multiply would save an instruction a score, and be wrong by half an ulp of m * scale.
#define SCORES_ARE_SCALED (HAS_SOFTCAP || HAS_ALIBI_SLOPES || MASK_IS_ADDED)

// The rows of a tile are queries of one head; or, in the decode kernel, of a query one row for each of the HEADS_IN_TILE heads that
// share their keys.
#ifndef HEADS_IN_TILE
#define HEADS_IN_TILE 1
#endif
METAL_FUNC int query_of(int row) { return row / HEADS_IN_TILE; }

METAL_FUNC float as_float(long bits) {
  return as_type<float>(int(bits));
}

// One sequence of the batch.
struct Sequence {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int rows_q;    // rows of the output that are its own: seqlen_q of them are queries, the others are zero
  long first_q;  // its first row, where the batch is packed
  long first_k;
};

// How the scores of one sequence and head are made.
struct Scoring {
  int seqlen_q;
  int offset;   // seqlen_k - seqlen_q: the last query is aligned with the last key
  int left;     // window_size
  int right;
  float scale;  // abs(softmax_scale k_descale), or 1 where that is 0: positive, so that rowmax(s) may be scaled after
  float sign;   // of that product: q is multiplied by it, -1, 0 or 1
  float exp2_scale;  // what makes a difference of scores an exponent of 2
#if HAS_SOFTCAP
  float scale_over_softcap;  // abs(softmax_scale) / softcap
  float softcap;
#endif
#if HAS_ALIBI_SLOPES
  float alibi_slope;
#endif
#if HAS_MASK
  device const MASK_T* mask;  // of this sequence and head
  long mask_head;
  long mask_row;
  long mask_column;

  METAL_FUNC device const MASK_T* mask_at(int row, int key) const thread {
    return mask + row % HEADS_IN_TILE * mask_head + query_of(row) * mask_row + key * mask_column;
  }
#endif
};

METAL_FUNC Scoring scoring_of(Sequence sequence, int head, Inputs in) {
  constant long* params = in.params;
#if HAS_SOFTMAX_SCALE
  float scale = float(in.softmax_scale[0]);
#else
  float scale = as_float(params[SOFTMAX_SCALE]);
#endif
  scale *= KV_UNIT;
#if HAS_K_DESCALE
  long head_k = head / params[HEADS_PER_KV_HEAD];
  scale *= in.k_descale[sequence.batch * params[K_DESCALE_BATCH] + head_k * params[K_DESCALE_HEAD]];
#endif
  Scoring scoring;
  scoring.seqlen_q = sequence.seqlen_q;
  scoring.offset = sequence.seqlen_k - sequence.seqlen_q;
  scoring.left = int(params[WINDOW_LEFT]);
  scoring.right = int(params[WINDOW_RIGHT]);
  if (abs(scale) < SMALLEST_SCALE) scale = 0.0f;
  scoring.sign = scale > 0.0f ? 1.0f : scale < 0.0f ? -1.0f : 0.0f;
  scale = scale == 0.0f ? 1.0f : abs(scale);
  scoring.scale = scale;
  scoring.exp2_scale = SCORES_ARE_SCALED ? LOG2E : scale * LOG2E;
#if HAS_SOFTCAP
  // At most the largest number: 0 times infinity would be NaN.
  scoring.scale_over_softcap = min(scale / as_float(params[SOFTCAP]), 3.40282347e38f);
  scoring.softcap = as_float(params[SOFTCAP]);
#endif
#if HAS_ALIBI_SLOPES
  scoring.alibi_slope = in.alibi_slopes[sequence.batch * params[ALIBI_BATCH] + head];
#endif
#if HAS_MASK
  scoring.mask = in.mask + sequence.batch * params[MASK_BATCH] + head * params[MASK_HEAD];
  // A stride of 0 or 1 is compiled in, so that elements which are the same are read once and neighbours together.
  scoring.mask_head = params[MASK_HEAD];
  scoring.mask_row = MASK_ROWS_ARE_ONE ? 0 : params[MASK_ROW];
  scoring.mask_column = MASK_COLUMNS_ARE_ONE ? 0 : MASK_ALIGNED ? 1 : params[MASK_COLUMN];
#endif
  return scoring;
}

// Does the query see the key, by the sequence's length and the window? Not by the mask.
METAL_FUNC bool is_visible(Scoring scoring, int row, int key, int seqlen_k) {
  bool seen = key < seqlen_k;
#if HAS_WINDOW_RIGHT
  seen = seen && key <= row + scoring.offset + scoring.right;
#endif
#if HAS_WINDOW_LEFT
  seen = seen && key >= row + scoring.offset - scoring.left;
#endif
  return seen;
}

// Near 0, where a large softcap puts every x, 1 - exp2(..) would cancel: there, the Taylor series up to x^9.
METAL_FUNC float tanh_of(float x) {
  float xx = x * x;
  float small = x * fma(xx, fma(xx, fma(xx, fma(xx, 62.0f / 2835.0f, -17.0f / 315.0f), 2.0f / 15.0f), -1.0f / 3.0f), 1.0f);
  float e = fast::exp2(abs(x) * (-2.0f * LOG2E));  // at most 1: the division never meets an infinity
  float large = copysign(fast::divide(1.0f - e, 1.0f + e), x);
  return abs(x) < 0.25f ? small : large;
}

// The score that q k becomes: scale, soft-capping and ALiBi, but no mask. Without SCORES_ARE_SCALED just q k.
// `slope`: of the soft-capping at that score, 1 without.
METAL_FUNC float score_mod(float qk, Scoring scoring, int row, int key, thread float& slope) {
  float s = qk;
  slope = 1.0f;
#if HAS_SOFTCAP
  float t = tanh_of(s * scoring.scale_over_softcap);
  slope = fma(-t, t, 1.0f);
  s = scoring.softcap * t;
#elif SCORES_ARE_SCALED
  s *= scoring.scale;
#endif
#if HAS_ALIBI_SLOPES
  s -= scoring.alibi_slope * float(abs(row + scoring.offset - key));
#endif
  return s;
}
METAL_FUNC float score_mod(float qk, Scoring scoring, int row, int key) {
  float slope;
  return score_mod(qk, scoring, row, key, slope);
}

// A score under its element of the mask. A hidden score is -inf even if it was NaN.
METAL_FUNC float apply_mask(float s, MASK_T x) {
#if MASK_IS_BOOL
  return x ? s : -INFINITY;
#else
  return float(x) == -INFINITY ? -INFINITY : s + float(x);
#endif
}

// exp of the difference of two scores.
METAL_FUNC float exp_of_difference(float s, float base, Scoring scoring) {
  return fast::exp2((s - base) * scoring.exp2_scale);
}

// What a row's maximum and sum come to: the largest score m, to base e, and the sum l of exp(score - m), sink included. o,
// relative to the maximum without the sink, is to be multiplied by `rescale`.
struct RowStatistics {
  float m;
  float l;
  float rescale;
};

METAL_FUNC RowStatistics statistics_of(float m, float l, Scoring scoring, int head, Inputs in) {
  RowStatistics row;
  row.m = SCORES_ARE_SCALED ? m : m * scoring.scale;
  row.l = l;
  row.rescale = 1.0f;
#if HAS_SINKS
  float sink = in.sinks[head];
  float largest = max(row.m, sink);
  float base = largest == -INFINITY ? 0.0f : largest;
  row.rescale = exp2((row.m - base) * LOG2E);
  row.l = l * row.rescale + exp2((sink - base) * LOG2E);
  row.m = largest;
#endif
  return row;
}

// Of which the log-sum-exp, as the caller gets it.
METAL_FUNC float log_sum_exp(RowStatistics row) { return row.m + log2(row.l) / LOG2E; }

METAL_FUNC Sequence sequence_of(int batch, Inputs in) {
  constant long* params = in.params;
  Sequence sequence;
  sequence.batch = batch;
  sequence.first_q = 0;
  sequence.first_k = 0;
  sequence.seqlen_q = sequence.rows_q = int(params[SEQLEN_Q]);
  sequence.seqlen_k = int(params[SEQLEN_K]);
#if HAS_CU_SEQLENS_Q
  sequence.first_q = in.cu_seqlens_q[batch];
  sequence.seqlen_q = in.cu_seqlens_q[batch + 1] - in.cu_seqlens_q[batch];
  // Rows behind the last sequence count as its own, so that somebody writes them.
  int end = batch == int(params[BATCH]) - 1 ? int(params[TOTAL_Q]) : in.cu_seqlens_q[batch + 1];
  sequence.rows_q = end - in.cu_seqlens_q[batch];
#endif
#if HAS_CU_SEQLENS_K
  sequence.first_k = in.cu_seqlens_k[batch];
  sequence.seqlen_k = in.cu_seqlens_k[batch + 1] - in.cu_seqlens_k[batch];
#endif
#if HAS_SEQUSED_Q
  sequence.seqlen_q = min(sequence.seqlen_q, in.seqused_q[batch]);
#endif
#if HAS_SEQUSED_K
  sequence.seqlen_k = min(sequence.seqlen_k, in.seqused_k[batch]);
#endif
  return sequence;
}

// The sequence that a tile of `rows` rows belongs to, and which of its tiles it is. A packed batch has at most
// total / rows + batch tiles: sequence b gets those from cu_seqlens_q[b] / rows + b on, at most one more than it needs;
// the last one those of all rows behind it too. (HEADS_IN_TILE times as many rows, in the decode kernel.)
struct Tile {
  Sequence sequence;
  int index;
};

// The sequence of a packed batch that tile number `group` of `rows` rows belongs to, where each row of the batch is `times` rows.
METAL_FUNC int packed_sequence_of(int group, int rows, int times, device const int* cu_seqlens, int batch) {
  int low = 0, high = batch - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] * times / rows + middle <= group) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

METAL_FUNC Tile tile_of(int group, int batch, int rows, Inputs in) {
  Tile tile;
  tile.index = group;
#if HAS_CU_SEQLENS_Q
  batch = packed_sequence_of(group, rows, HEADS_IN_TILE, in.cu_seqlens_q, int(in.params[BATCH]));
  tile.index = group - (in.cu_seqlens_q[batch] * HEADS_IN_TILE / rows + batch);
#endif
  tile.sequence = sequence_of(batch, in);
  return tile;
}
