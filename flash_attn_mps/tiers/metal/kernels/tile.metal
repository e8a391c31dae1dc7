// What a simdgroup of forward.metal holds, and how it computes with a block of keys: what attend.metal asks of a `State`.

// A simdgroup has the whole of its rows.
#define SLICES 1
constant constexpr int GROUP_ROWS = ROWS * SIMDGROUPS, SLICE_D = HEAD_DIM, SLICE_DV = HEAD_DIM_V;

// Line 8: s = q k^T for key fragments `begin` to `end` - 1, a slab of the head dim after the other, so that few fragments of k
// and q are in registers together; and of a slab one of PARTS parts after the other.
template <typename S>
struct ScoresOf {
  template <int PARTS, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread Queries& queries,
      AnyLaneRows rows,
      int begin,
      int end,
      Lane lane) {
    constexpr int COUNT = S::W % PARTS ? S::W : S::W / PARTS;
    AnyLaneRows moved = rows.beside(S::right_transposed_begin(lane));
    add_part<0, COUNT>(s, queries, moved, begin, end, lane);
    if (COUNT < S::W) add_part<S::W - COUNT, COUNT>(s, queries, moved, begin, end, lane);
    ScoresOf<typename S::Rest>::template add<PARTS>(s, queries, rows, begin, end, lane);
  }
  template <int PART, int COUNT, typename AnyLaneRows>
  METAL_FUNC static void add_part(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread Queries& queries,
      AnyLaneRows rows,
      int begin,
      int end,
      Lane lane) {
#if SHARED_Q
    if (PART > 0) simdgroup_barrier(mem_flags::mem_threadgroup);  // so that no compiler loads a slab's parts together
#endif
    Operand q[ROW_FRAGMENTS][COUNT];
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) queries.template slab<S, PART, COUNT>(q[r], r, lane);
    UNROLL for (int n = begin; n < end; ++n) {
      Operand k[COUNT];
      S::template load_right_transposed_from<COUNT, PART>(
          k, rows.at(key_of(0, n, 0, 0)), rows.at(key_of(0, n, 0, 1)), lane);
      UNROLL for (int f = 0; f < COUNT; ++f)
        UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) simdgroup_multiply_accumulate(s[r][n], q[r][f], k[f], s[r][n]);
    }
  }
};
template <int DIM, int ALIGNED, int FIRST>
struct ScoresOf<Slab<DIM, ALIGNED, FIRST, END>> {
  template <int PARTS, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread Queries&, AnyLaneRows, int, int, Lane) {}
};

// Line 10 for fragment n of a block, likewise.
template <typename S>
struct ValuesOf {
  template <bool HIDDEN, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&o)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      AnyLaneRows rows,
      int n,
      Lane lane) {
    Operand v[S::W];
    AnyLaneRows moved = rows.beside(S::right_begin(lane));
    S::load_right_slab_from(v, moved.at(key_of(0, n, 0, 0)), lane);
    add_pv<HIDDEN, S::FRAGMENT>(o, p, visible, v, n);
    ValuesOf<typename S::Rest>::template add<HIDDEN>(o, p, visible, rows, n, lane);
  }
};
template <int DIM, int ALIGNED, int FIRST>
struct ValuesOf<Slab<DIM, ALIGNED, FIRST, END>> {
  template <bool HIDDEN, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread Operand (&)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&)[ROW_FRAGMENTS],
      AnyLaneRows,
      int,
      Lane) {}
};

// A simdgroup's queries, and their attention over the blocks so far.
struct State {
  Queries q;
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
  int first_row;
  enum { slice = 0 };
  Kept kept;

  // s += q k^T. EDGE: there may be fewer keys than the block has.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void add_qk(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], AnyKeys keys, int first_key, Lane lane) thread {
    LaneRows<EDGE, decltype(keys.k)> rows;
    rows.begin(keys.k, key_of(first_key, 0, lane.column, 0), keys.seqlen);
    // At an edge and in pages the address of each key is its own: one fragment of keys at a time, so that few are needed together.
    // At an edge half as much of the queries, too, where they have to be loaded.
    constexpr int COUNT = EDGE || HAS_BLOCK_TABLE ? 1 : KEY_FRAGMENTS, PARTS = EDGE && SHARED_Q ? 2 : 1;
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; n += COUNT) {
#if SHARED_Q
      simdgroup_barrier(mem_flags::mem_threadgroup);  // so that no compiler keeps q in registers from one use to the next
#endif
      ScoresOf<SlabD>::add<PARTS>(s, q, rows, n, n + COUNT, lane);
    }
  }

  // o += p v. HIDDEN: some of the keys may be hidden.
  template <bool EDGE, bool HIDDEN, typename AnyKeys>
  METAL_FUNC void add_block_pv(
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      AnyKeys keys,
      int first_key,
      Lane lane) thread {
    LaneRows<EDGE, decltype(keys.v)> rows;
    rows.begin(keys.v, key_of(first_key, 0, lane.row, 0), keys.seqlen);
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n)
      ValuesOf<SlabV>::template add<HIDDEN>(o, p, visible, rows, n, lane);
  }

  // s of a block, where it is there already.
  METAL_FUNC bool take_s(thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], Lane) const thread { return false; }

  // How the scores of row fragment r are made.
  METAL_FUNC Scoring scoring_of_row(Scoring scoring, int) const thread { return scoring; }
};
