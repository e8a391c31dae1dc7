// What a simdgroup of forward.metal holds on cooperative tensors, and how it computes with a block of keys: what attend.metal asks of
// a `State`. In place of queries.metal, hidden.metal and tile.metal.

constant constexpr int ROW_TILES = ROWS / 16;
constant constexpr int KEY_TILES = KEYS / 32;

// With two SLICES the head dims are halved between the two simdgroups of a group, where one has no room for its rows of o: each
// computes its part of s, and adds that of the other.
constant constexpr int GROUP_ROWS = ROWS * SIMDGROUPS / SLICES;
constant constexpr int SLICE_D = HEAD_DIM / SLICES, SLICE_DV = HEAD_DIM_V / SLICES;
inline constexpr int slice_aligned(int aligned, int dim) {
  return SLICES == 1 || dim % aligned == 0 ? aligned : slice_aligned(aligned / 2, dim);
}

// Two fragments of k are loaded together where registers allow: a lane has twice as many neighbours then.
typedef Slab<SLICE_D, slice_aligned(VECTOR, SLICE_D), 1, SHARED_Q ? 1 : 2> SlabD;
typedef Slab<SLICE_DV, slice_aligned(VECTOR_V, SLICE_DV), 2, 2> SlabV;
constant constexpr int D_ELEMENTS = (SLICE_D + 15) / 16 * 4;  // of a row of q that a lane has
constant constexpr int DV_FRAGMENTS = (SLICE_DV + 31) / 32 * 4;

// Of the lane's KEYS / 4 keys of a block, eight in each tile, number i: fragment and element of s, p and `visible`, as MaskTile has
// them.
inline constexpr int fragment_of(int i) { return i % KEY_FRAGMENTS; }
inline constexpr int element_of(int i) { return i / KEY_FRAGMENTS; }

// A simdgroup's queries: in registers, or in threadgroup memory where the head dim leaves no room for them (SHARED_Q). There a lane
// reads what it has written itself, so that no barrier is needed.
#if SHARED_Q
struct QueryMemory {
  alignas(16) T elements[SIMDGROUPS][ROW_FRAGMENTS * D_ELEMENTS * 32];
};

// Of a slab of row fragment r; lanes lie next to each other.
template <typename S>
METAL_FUNC threadgroup T* place_of_q(threadgroup T* elements, int r, Lane lane) {
  return elements + 32 * (r * D_ELEMENTS + S::BEGIN / 4) + S::ELEMENTS * lane.index;
}
#endif

template <typename S>
struct QueriesOf {
  template <typename Queries>
  METAL_FUNC static void load(thread Queries& queries, int r, device const T* row, float factor, Lane lane) {
    T x[S::ELEMENTS];
    S::load_q(x, row, factor, lane);
    queries.template put<S>(x, r, lane);
    QueriesOf<typename S::Rest>::load(queries, r, row, factor, lane);
  }
};
template <int DIM, int ALIGNED, int LEAST, int MOST, int FIRST>
struct QueriesOf<Slab<DIM, ALIGNED, LEAST, MOST, FIRST, 0>> {
  template <typename Queries>
  METAL_FUNC static void load(thread Queries&, int, device const T*, float, Lane) {}
};

struct Queries {
#if SHARED_Q
  threadgroup T* elements;

  template <typename S>
  METAL_FUNC void put(thread T (&from)[S::ELEMENTS], int r, Lane lane) thread {
    Elements<S::ELEMENTS>::store(place_of_q<S>(elements, r, lane), from);
  }
  template <typename S>
  METAL_FUNC void get(thread T (&to)[S::ELEMENTS], int r, Lane lane) const thread {
    Elements<S::ELEMENTS>::load(to, place_of_q<S>(elements, r, lane));
  }
#else
  T elements[ROW_FRAGMENTS][D_ELEMENTS];

  template <typename S>
  METAL_FUNC void put(thread T (&from)[S::ELEMENTS], int r, Lane) thread {
    UNROLL for (int i = 0; i < S::ELEMENTS; ++i) elements[r][S::BEGIN / 4 + i] = from[i];
  }
  template <typename S>
  METAL_FUNC void get(thread T (&to)[S::ELEMENTS], int r, Lane) const thread {
    UNROLL for (int i = 0; i < S::ELEMENTS; ++i) to[i] = elements[r][S::BEGIN / 4 + i];
  }
#endif

  METAL_FUNC void load(int r, device const T* row, float factor, Lane lane) thread {
    QueriesOf<SlabD>::load(*this, r, row, factor, lane);
  }
};

// Line 8: s = q k^T, a slab of the head dim after the other, so that few operands are in registers together.
template <typename S>
struct ScoresOf {
  template <typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread Queries& queries,
      AnyLaneRows rows,
      Products products,
      Lane lane) {
    T q[ROW_FRAGMENTS][S::ELEMENTS];
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) queries.template get<S>(q[r], r, lane);
    UNROLL for (int tile = 0; tile < KEY_TILES; ++tile) {
      T k[S::COUNT][16];
      S::load_k(k, rows, 8 * tile, lane);
      UNROLL for (int f = 0; f < S::COUNT; ++f)
        UNROLL for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) product(s, q, k[f], f, row_tile, tile, products, lane);
    }
    ScoresOf<typename S::Rest>::add(s, queries, rows, products, lane);
  }

  // Of fragment f.
  METAL_FUNC static void product(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread T (&q)[ROW_FRAGMENTS][S::ELEMENTS],
      thread T (&k)[16],
      int f,
      int row_tile,
      int tile,
      Products products,
      Lane lane) {
    float c[16];
    T a[8];
    UNROLL for (int r = 0; r < 2; ++r) {
      UNROLL for (int j = 0; j < 4; ++j) a[4 * r + j] = q[2 * row_tile + r][q_element(S::COUNT, f, j)];
      UNROLL for (int t = 0; t < 8; ++t)
        c[slot_of(r, t)] = s[2 * row_tile + r][fragment_of(8 * tile + t)].thread_elements()[element_of(8 * tile + t)];
    }
    products.template add<true>(c, a, k, lane);
    UNROLL for (int r = 0; r < 2; ++r)
      UNROLL for (int t = 0; t < 8; ++t)
        s[2 * row_tile + r][fragment_of(8 * tile + t)].thread_elements()[element_of(8 * tile + t)] = c[slot_of(r, t)];
  }
};
template <int DIM, int ALIGNED, int LEAST, int MOST, int FIRST>
struct ScoresOf<Slab<DIM, ALIGNED, LEAST, MOST, FIRST, 0>> {
  template <typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread Queries&, AnyLaneRows, Products, Lane) {}
};

// Line 10 for half a tile of keys, likewise: o += p v. A hidden key has p = 0, but 0 * NaN is NaN, and memory that no query sees
// may hold anything. So where keys may be hidden, HIDDEN, NaN and infinities in v are replaced by 0, and NaN is put into o for those
// queries alone that see them.
template <typename S>
struct ValuesOf {
  // Rare, so that it may take time, but no registers: each key's columns are asked from the lane that has them.
  METAL_FUNC static void spread_nonfinite(
      thread Accumulator (&o)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      thread T (&v)[16],
      int half_tile,
      Lane lane) {
    ushort nonfinite = 0;  // of the lane's keys r, element t: bit 8 r + t
    UNROLL for (int r = 0; r < 2; ++r) {
      UNROLL for (int t = 0; t < 8; ++t) {
        bool is_nonfinite = !isfinite(float(v[slot_of(r, t)]));
        nonfinite |= ushort(is_nonfinite ? 1 << (8 * r + t) : 0);
        if (is_nonfinite) v[slot_of(r, t)] = T(0.0f);
      }
    }
    ushort reached[ROW_FRAGMENTS];  // of the row's elements
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) reached[r] = 0;
    for (int k = 0; k < 16; ++k) {
      ushort of_key = simd_shuffle(nonfinite, index_of(k % 8, lane.column / 2)) >> (8 * (k / 8));
      int i = 4 * half_tile + p_element(k);
      UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        ushort sees = simd_shuffle(visible[r], index_of(lane.row, p_quarter(k)));
        if (is_seen(sees, fragment_of(i), element_of(i))) reached[r] |= of_key;
      }
    }
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int t = 0; t < 8; ++t)
        if (reached[r] >> t & 1) o[r][S::BEGIN / 8 + t / 2].thread_elements()[t % 2] = NAN;
  }

  template <bool HIDDEN, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&o)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      AnyLaneRows rows,
      int half_tile,
      Products products,
      Lane lane) {
    T v[16];
    S::load_v(v, rows, half_tile, lane);
    if (HIDDEN) {
      float nan_if_nonfinite = 0.0f;
      UNROLL for (int i = 0; i < 16; ++i) nan_if_nonfinite += 0.0f * float(v[i]);
      if (simd_any(nan_if_nonfinite != 0.0f)) spread_nonfinite(o, visible, v, half_tile, lane);
    }
    UNROLL for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
      float c[16];
      T a[8];
      UNROLL for (int r = 0; r < 2; ++r) {
        UNROLL for (int j = 0; j < 4; ++j) {
          int t = 4 * half_tile + j;
          a[4 * r + j] = p[2 * row_tile + r][fragment_of(t)].thread_elements()[element_of(t)];
        }
        UNROLL for (int t = 0; t < 8; ++t)
          c[slot_of(r, t)] = o[2 * row_tile + r][S::BEGIN / 8 + t / 2].thread_elements()[t % 2];
      }
      products.template add<false>(c, a, v, lane);
      UNROLL for (int r = 0; r < 2; ++r)
        UNROLL for (int t = 0; t < 8; ++t)
          o[2 * row_tile + r][S::BEGIN / 8 + t / 2].thread_elements()[t % 2] = c[slot_of(r, t)];
    }
    ValuesOf<typename S::Rest>::template add<HIDDEN>(o, p, visible, rows, half_tile, products, lane);
  }
};
template <int DIM, int ALIGNED, int LEAST, int MOST, int FIRST>
struct ValuesOf<Slab<DIM, ALIGNED, LEAST, MOST, FIRST, 0>> {
  template <bool HIDDEN, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread Operand (&)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&)[ROW_FRAGMENTS],
      AnyLaneRows,
      int,
      Products,
      Lane) {}
};

#if SLICES > 1
// What the simdgroups of a group have of s, by turns: one barrier a block is enough.
struct SlicesOfScores {
  float elements[2][SLICES][ROW_FRAGMENTS * KEY_FRAGMENTS * 2][32];
};

// s of a block from its slices, which both add in the same order: they must agree.
METAL_FUNC void add_slices(
    thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
    threadgroup SlicesOfScores& slices,
    int turn,
    int slice,
    Lane lane) {
  UNROLL for (int i = 0; i < ROW_FRAGMENTS * KEY_FRAGMENTS * 2; ++i)
    slices.elements[turn][slice][i][lane.index] = s[i / 2 / KEY_FRAGMENTS][i / 2 % KEY_FRAGMENTS].thread_elements()[i % 2];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int i = 0; i < ROW_FRAGMENTS * KEY_FRAGMENTS * 2; ++i)
    s[i / 2 / KEY_FRAGMENTS][i / 2 % KEY_FRAGMENTS].thread_elements()[i % 2] =
        slices.elements[turn][0][i][lane.index] + slices.elements[turn][1][i][lane.index];
}
#endif

// A simdgroup's queries, and their attention over the blocks so far.
struct State {
  Queries q;
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
  int first_row;
#if SLICES > 1
  int slice;
  int turn;  // of two: so that one barrier a block is enough
  threadgroup SlicesOfScores* slices;
#else
  enum { slice = 0 };
#endif
  Kept kept;
  Products products;

  // s += q k^T. EDGE: there may be fewer keys than the block has.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void add_qk(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], AnyKeys keys, int first_key, Lane lane) thread {
    LaneRows<EDGE, decltype(keys.k)> rows;
    keys.k.base += slice * SLICE_D;
    rows.begin(keys.k, first_key + first_k_key(lane), keys.seqlen);
    ScoresOf<SlabD>::add(s, q, rows, products, lane);
#if SLICES > 1
    add_slices(s, *slices, turn, slice, lane);
    turn = 1 - turn;
#endif
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
    keys.v.base += slice * SLICE_DV;
    rows.begin(keys.v, first_key + first_v_key(lane), keys.seqlen);
    // So that no compiler loads v while s is in registers, or keeps q there from one block to the next.
    simdgroup_barrier(SHARED_Q ? mem_flags::mem_threadgroup : mem_flags::mem_none);
    UNROLL for (int half_tile = 0; half_tile < 2 * KEY_TILES; ++half_tile)
      ValuesOf<SlabV>::template add<HIDDEN>(o, p, visible, rows, half_tile, products, lane);
  }

  // s of a block, where it is there already.
  METAL_FUNC bool take_s(thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], Lane) const thread { return false; }

  // How the scores of row fragment r are made.
  METAL_FUNC Scoring scoring_of_row(Scoring scoring, int) const thread { return scoring; }
};
