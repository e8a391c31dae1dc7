// The backward pass: FlashAttention-2, algorithm 2 (Dao, 2023, https://arxiv.org/abs/2307.08691), in kernels of one text without
// atomics. q, k, v, o, s, p, ds, dp, do and so on are the paper's letters.
//
// A simdgroup holds HELD rows of one side and lets those of the other side that go with them pass, eight at a time. Held rows
// are operands a and b, passing ones c and e:
//
//                          held: a     b     passing: c     e
//   backward_queries.metal       q     do             k     v        s^T = k q^T   dp^T = v do^T    dq += ds k
//   backward_keys.metal          k     v              q     do       s   = q k^T   dp   = do v^T    dk += ds^T q   dv += p^T do
//
// Either way x = c a^T and y = e b^T have the passing rows for rows, and da += (ds of x)^T c, db += (p of x)^T e. So passing
// rows are loaded once, as rows, and serve as left operands first and as right ones then; what is transposed is ds and p, two
// elements a lane.
//
// NEEDS_DP: is ds computed, and with it y? HAS_DA, HAS_DB: which gradients of held rows are wanted. HAS_DM: of the mask, which is
// ds itself: backward_mask.metal.

constant constexpr bool KEEPS_C = !RELOAD && HAS_DA;  // do passing fragments stay in registers until they are needed again?
constant constexpr bool KEEPS_E = !RELOAD && HAS_DB && NEEDS_DP;

// What the preparation found out about a query: backward_rows.metal.
METAL_FUNC float probability(float s, float4 terms, Scoring scoring) {
  return fast::exp2(fma(s - terms.x, scoring.exp2_scale, -terms.y));
}

// Threadgroup memory: the held rows of each simdgroup, and a block of the passing ones.
struct Memory {
#if !HELD_IN_REGISTERS
  HeldMemory held[SIMDGROUPS];
#endif
#if STAGED
  Staging<PASSING, 1> staging;
#endif
};
#if STAGED || !HELD_IN_REGISTERS
#define DECLARE_MEMORY threadgroup Memory declared_memory; threadgroup Memory* memory = &declared_memory;
#else
#define DECLARE_MEMORY threadgroup Memory* memory = nullptr;
#endif

#if HAS_DROPOUT
// Passing rows whose random bits are made together: as many as give every lane a byte to make.
constant constexpr int KEPT_PASSING = OF_KEYS ? 32 / HELD_FRAGMENTS : 8 * 32 / HELD;
#if OF_KEYS
typedef KeptBlock<KEPT_PASSING, HELD_FRAGMENTS> Kept;
#else
typedef KeptBlock<HELD, KEPT_PASSING / 8> Kept;
#endif
#endif

struct Held {
  int first;
  int count;  // rows of the sequence on this side
  HeldOperands operands;
#if HAS_DA
  Accumulator da[HELD_FRAGMENTS][D_FRAGMENTS];
#endif
#if HAS_DB
  Accumulator db[HELD_FRAGMENTS][DV_FRAGMENTS];
#endif
#if HAS_DM
  Accumulator dm[HELD_FRAGMENTS];  // passing rows by held ones
#endif
#if !OF_KEYS
  float4 terms[HELD_FRAGMENTS][2];  // of the queries of this lane's two columns
#endif
#if HAS_MASK && STAGED
  int turn;  // of the votes about a run of blocks
#endif
#if HAS_DROPOUT
  Kept kept;
  int kept_first;  // the passing row that it begins with

  // Makes the bits of the eight passing rows from `first` on, unless they are made.
  METAL_FUNC void keep(Dropout dropout, int first_passing, Lane lane) thread {
    if (first_passing < kept_first + KEPT_PASSING) return;
    kept_first = first_passing;
    kept.make(dropout, OF_KEYS ? first_passing : first, OF_KEYS ? first : first_passing, lane);
  }

  // Is the score of this lane's row of those eight and its column i of held fragment r kept?
  METAL_FUNC bool keeps(int first_passing, int r, int i, Lane lane) const thread {
#if OF_KEYS
    return kept.byte(first_passing - kept_first + lane.row, r) >> (lane.column + i) & 1;
#else
    return kept.byte(8 * r + lane.column + i, (first_passing - kept_first) / 8) >> lane.row & 1;
#endif
  }
#endif
};

// The rows of the other side, in device memory or staged.
template <typename C, typename E>
struct Passing {
  C c;
  E e;
  int count;  // of the sequence
#if OF_KEYS
  device const float4* terms;  // of the sequence's queries
#endif
};

// Eight passing rows, from `first` on. `edge`: some of their scores may be hidden by a side of the window, or lie past the
// sequence's end, where the last row stands for those that there are not. `altered`: the mask is applied. Both are tests of a
// few instructions that the rest shares; a copy of all of it for each, as the forward pass has, costs 20 registers more.
template <typename C, typename E>
METAL_FUNC void attend(
    bool edge, bool altered, thread Held& held, Passing<C, E> passing, Scoring scoring, Dropout dropout, int first, Lane lane) {
  int passes = first + lane.row, inside = min(passes, passing.count - 1);
  auto row_c = passing.c.at(inside);
  auto row_e = passing.e.at(inside);
  Operand kept_c[KEEPS_C ? D_FRAGMENTS : 1], kept_e[KEEPS_E ? DV_FRAGMENTS : 1];
#if OF_KEYS
  float4 terms_of_row = passing.terms[inside];
#endif
  // s = q k^T and dp = do v^T, or both transposed
  Accumulator x[HELD_FRAGMENTS], y[HELD_FRAGMENTS];
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) x[r] = y[r] = zeros();
  Product<SlabD, true, KEEPS_C>::run(x, held.operands, row_c, kept_c, lane);
#if NEEDS_DP
  Product<SlabV, false, KEEPS_E>::run(y, held.operands, row_e, kept_e, lane);
#endif
#if HAS_DROPOUT
  held.keep(dropout, first, lane);
#endif

  // p = exp(s - lse) and ds = p (dp - delta). What is hidden is 0 by selection: any of the rest may be NaN.
  Operand p[HELD_FRAGMENTS], ds[HELD_FRAGMENTS];
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) {
    UNROLL for (int i = 0; i < 2; ++i) {
      int holds = held.first + 8 * r + lane.column + i;
#if OF_KEYS
      int row = passes, key = holds;
      float4 terms = terms_of_row;
#else
      int row = holds, key = passes;
      float4 terms = held.terms[r][i];
#endif
      float s = x[r].thread_elements()[i], slope = 1.0f;
#if SCORES_ARE_SCALED
      s = score_mod(s, scoring, row, key, slope);
#endif
#if HAS_MASK
      int seqlen_k = scoring.seqlen_q + scoring.offset;
      if (altered) s = apply_mask(s, *scoring.mask_at(min(row, scoring.seqlen_q - 1), min(key, seqlen_k - 1)));
#endif
      float prob = probability(s, terms, scoring), dp = y[r].thread_elements()[i], kept = prob;
#if HAS_DROPOUT
      if (!held.keeps(first, r, i, lane)) dp = kept = 0.0f;
#endif
#if HAS_DM
      slope = 1.0f;  // the mask is added behind the soft-capping
#endif
      float change = prob * (dp - terms.z) * slope;
      if (edge || altered) {
        bool hidden = altered && s == -INFINITY;
        if (edge) hidden = hidden || passes >= passing.count || !is_visible(scoring, row, key, OF_KEYS ? held.count : passing.count);
        if (hidden) kept = change = 0.0f;
      }
#if HAS_DM
      held.dm[r].thread_elements()[i] += change;
#endif
      p[r].thread_elements()[i] = T(kept);
      ds[r].thread_elements()[i] = T(change);
    }
  }
#if RELOAD
  // The same row, which the compiler does not know: else it would keep the fragments whatever the source says.
  inside = simd_shuffle(inside, lane.index);
  row_c = passing.c.at(inside);
  row_e = passing.e.at(inside);
#endif
#if HAS_DB
  // dv += p^T do. A query that sees nothing may have anything for its gradient; that of one that does must show.
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) p[r] = transposed(p[r], lane.index);
  bool sees_nothing = terms_of_row.y == INFINITY;
  Gather<SlabV, DV_FRAGMENTS, KEEPS_E>::run(held.db, p, row_e, kept_e, edge || altered, sees_nothing, lane);
#endif
#if HAS_DA
  // dq += ds k, or dk += ds^T q. Whoever sees a row that is not finite has NaN from its score.
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) ds[r] = transposed(ds[r], lane.index);
  Gather<SlabD, D_FRAGMENTS, KEEPS_C>::run(held.da, ds, row_c, kept_c, edge || altered, true, lane);
#endif
}

// The block of PASSING rows from `first` on. `altered`: the mask changes scores of this block. Not unrolled: the addresses of all
// its rows at once would cost many registers.
template <typename C, typename E>
METAL_FUNC void visit(
    bool altered, thread Held& held, Passing<C, E> passing, Scoring scoring, Dropout dropout, VisibleRange range, int first,
    Lane lane) {
  _Pragma("clang loop unroll(disable)") for (int n = 0; n < PASSING; n += 8)
    if (range.overlaps(first + n, 8))
      attend(!range.contains(first + n, 8), altered, held, passing, scoring, dropout, first + n, lane);
}

// The block of PASSING rows from `first` on for the whole threadgroup; a simdgroup that does not need it only helps to stage it.
METAL_FUNC void pass_block(
    bool needed, bool altered, thread Held& held, Passing<Rows, Rows> passing, Scoring scoring, Dropout dropout,
    VisibleRange range, int first, threadgroup Memory* memory, ushort simdgroup, Lane lane) {
#if STAGED
  stage_block(memory->staging, passing.c, passing.e, first, passing.count, ushort(simdgroup * 32 + lane.index));
  if (!needed) return;
  Passing<StagedRows<STAGED_K_ROW, 1>, StagedRows<STAGED_V_ROW, 1>> staged;
  staged.c.base = memory->staging.k;
  staged.e.base = memory->staging.v;
  staged.c.first = staged.e.first = first;
  staged.count = passing.count;
#if OF_KEYS
  staged.terms = passing.terms;
#endif
  visit(altered, held, staged, scoring, dropout, range, first, lane);
#else
  visit(altered, held, passing, scoring, dropout, range, first, lane);
#endif
}

// Lets all rows pass that the held ones go with: those of `range`, of `group_range` for the whole threadgroup. Under a mask in
// runs: `scan_mask` looks at a run's blocks together.
METAL_FUNC void pass_all(
    thread Held& held, Passing<Rows, Rows> passing, Scoring scoring, Dropout dropout, VisibleRange range,
    VisibleRange group_range, threadgroup Memory* memory, ushort simdgroup, Lane lane) {
#if HAS_DROPOUT
  held.kept_first = -KEPT_PASSING;  // none yet
#endif
  int begin = STAGED ? group_range.visible_begin : range.visible_begin;
  int end = STAGED ? group_range.visible_end : range.visible_end;
#if HAS_MASK
  int seqlen_k = scoring.seqlen_q + scoring.offset;
  // Vectors of the mask would go beyond the last key.
  bool beyond = OF_KEYS && held.first + HELD > seqlen_k;
  for (int run = begin; run < end; run += BLOCKS_PER_RUN * PASSING) {
    BlockFlags flags;
    flags.visible = flags.altered = 0;
    if (range.visible_end > 0) {
      if (beyond) range.full_end = range.full_begin;
      int first_row = OF_KEYS ? run : held.first, first_key = OF_KEYS ? held.first : run;
      flags = scan_mask<OF_KEYS != 0>(range, scoring, first_row, first_key, PASSING, seqlen_k, lane);
    }
    uint visible = flags.visible;
#if STAGED
    held.turn ^= 1;
    visible = visible_to_any(memory->staging.votes, visible, held.turn, simdgroup, lane.index);
#endif
    for (; visible; visible &= visible - 1) {
      uint block = ctz(visible);
      bool needed = flags.visible >> block & 1, altered = flags.altered >> block & 1;
      pass_block(
          needed, altered, held, passing, scoring, dropout, range, run + int(block) * PASSING, memory, simdgroup, lane);
    }
  }
#else
  for (int first = begin; first < end; first += PASSING)
    pass_block(
        range.overlaps(first, PASSING), false, held, passing, scoring, dropout, range, first, memory, simdgroup, lane);
#endif
}

// Holds rows of a, times `sign`, and of b, from held.first on; no gradient yet.
METAL_FUNC void hold(
    thread Held& held, Rows a, Rows b, float sign, threadgroup Memory* memory, ushort simdgroup, Lane lane) {
#if !HELD_IN_REGISTERS
  held.operands.a = memory->held[simdgroup].a + lane.index * HELD_TOGETHER * 2;
#if NEEDS_DP
  held.operands.b = memory->held[simdgroup].b + lane.index * HELD_TOGETHER * 2;
#endif
#endif
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) {
    int row0 = min(held.first + 8 * r + lane.column, held.count - 1);
    int row1 = min(held.first + 8 * r + lane.column + 1, held.count - 1);
    Hold<SlabD, true>::run(held.operands, r, a.at(row0), a.at(row1), sign, lane);
#if NEEDS_DP
    Hold<SlabV, false>::run(held.operands, r, b.at(row0), b.at(row1), 1.0f, lane);
#endif
#if HAS_DA
    UNROLL for (int f = 0; f < D_FRAGMENTS; ++f) held.da[r][f] = zeros();
#endif
#if HAS_DB
    UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) held.db[r][f] = zeros();
#endif
  }
}

// Stores a gradient of rows from `first` on, times `factor`: `rows` of memory are the sequence's own, and those that are not
// among its `count` get zeros.
template <typename S, int FRAGMENTS, typename Out>
METAL_FUNC void store_rows(
    thread Accumulator (&from)[HELD_FRAGMENTS][FRAGMENTS], device Out* to, long stride, int first, int count, int rows,
    float factor, Lane lane) {
  UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) {
    int row = first + 8 * r + lane.row;
    if (row >= count) UNROLL for (int f = 0; f < FRAGMENTS; ++f) from[r][f] = zeros();
    if (row < rows) S::store(to + row * stride, from[r], factor, lane);
  }
}

METAL_FUNC Rows rows_of(device const T* base, long row_stride) {
  Rows rows;
  rows.base = base;
  rows.row_stride = row_stride;
  return rows;
}

// The queries of a sequence and head, and the gradients of their outputs.
METAL_FUNC Rows q_rows_of(Sequence sequence, int head, device const T* q, Inputs in) {
  constant long* params = in.params;
  return rows_of(
      q + sequence.batch * params[Q_BATCH] + sequence.first_q * params[Q_ROW] + head * params[Q_HEAD], params[Q_ROW]);
}
METAL_FUNC Rows do_rows_of(Sequence sequence, int head, device const T* dout, Inputs in) {
  constant long* params = in.params;
  return rows_of(
      dout + sequence.batch * params[DOUT_BATCH] + sequence.first_q * params[DOUT_ROW] + head * params[DOUT_HEAD],
      params[DOUT_ROW]);
}
METAL_FUNC device const float4* terms_of(Sequence sequence, int head, device const float4* terms, Inputs in) {
  constant long* params = in.params;
  return terms + sequence.batch * params[LSE_BATCH] + sequence.first_q + head * params[LSE_HEAD];
}

#if OF_KEYS
METAL_FUNC Passing<Rows, Rows> queries_of(
    Sequence sequence, int head, device const T* q, device const T* dout, device const float4* terms, Inputs in) {
  Passing<Rows, Rows> passing;
  passing.c = q_rows_of(sequence, head, q, in);
  passing.e = do_rows_of(sequence, head, dout, in);
  passing.count = sequence.seqlen_q;
  passing.terms = terms_of(sequence, head, terms, in);
  return passing;
}
#endif
