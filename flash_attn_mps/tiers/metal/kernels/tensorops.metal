// What a simdgroup of forward.metal holds on cooperative tensors, and how it computes with a block of keys: what attend.metal asks of
// a `State`. In place of queries.metal, hidden.metal and tile.metal.

constant constexpr int ROW_TILES = ROWS / 16;
constant constexpr int KEY_TILES = KEYS / 32;

typedef Slab<HEAD_DIM, VECTOR, 1> SlabD;
typedef Slab<HEAD_DIM_V, VECTOR_V, 2> SlabV;
constant constexpr int D_ELEMENTS = (HEAD_DIM + 15) / 16 * 4;  // of a row of q that a lane has
constant constexpr int DV_FRAGMENTS = (HEAD_DIM_V + 31) / 32 * 4;

// Element t of a lane's row in a tile of 32 keys: fragment and element of s, p and `visible`, as MaskTile has them.
inline constexpr int fragment_of(int tile, int t) { return (8 * tile + t) % KEY_FRAGMENTS; }
inline constexpr int element_of(int tile, int t) { return (8 * tile + t) / KEY_FRAGMENTS; }

// A simdgroup's queries: in registers, or read again for each block.
template <typename S>
struct QueriesOf {
  METAL_FUNC static void load(thread T* to, device const T* row, float factor, Lane lane) {
    S::load_q(to + S::BEGIN / 4, row, factor, lane);
    QueriesOf<typename S::Rest>::load(to, row, factor, lane);
  }
};
template <int DIM, int ALIGNED, int LEAST, int FIRST>
struct QueriesOf<Slab<DIM, ALIGNED, LEAST, FIRST, 0>> {
  METAL_FUNC static void load(thread T*, device const T*, float, Lane) {}
};

#if RESIDENT_Q
struct Queries {
  T elements[ROW_FRAGMENTS][D_ELEMENTS];

  METAL_FUNC void load(int r, device const T* row, float factor, Lane lane) thread {
    QueriesOf<SlabD>::load(elements[r], row, factor, lane);
  }
  // A slab of row fragment r.
  template <typename S>
  METAL_FUNC void slab(thread T (&to)[S::ELEMENTS], int r, Lane) const thread {
    UNROLL for (int i = 0; i < S::ELEMENTS; ++i) to[i] = elements[r][S::BEGIN / 4 + i];
  }
};
#else
struct Queries {
  device const T* rows[ROW_FRAGMENTS];
  float sign;

  METAL_FUNC void load(int r, device const T* row, float factor, Lane) thread {
    rows[r] = row;
    sign = factor;
  }
  template <typename S>
  METAL_FUNC void slab(thread T (&to)[S::ELEMENTS], int r, Lane lane) const thread {
    S::load_q(to, rows[r], sign, lane);
  }
};
#endif

// Line 8: s = q k^T for one tile of keys, a slab of the head dim after the other, so that few operands are in registers together.
template <typename S>
struct ScoresOf {
  template <typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread Queries& queries,
      AnyLaneRows rows,
      int tile,
      Products products,
      Lane lane) {
    T k[S::COUNT][16], q[ROW_FRAGMENTS][S::ELEMENTS];
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) queries.template slab<S>(q[r], r, lane);
    S::load_k(k, rows, 8 * tile, lane);
    UNROLL for (int f = 0; f < S::COUNT; ++f) {
      UNROLL for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
        float c[16];
        T a[8];
        UNROLL for (int r = 0; r < 2; ++r) {
          UNROLL for (int j = 0; j < 4; ++j) a[4 * r + j] = q[2 * row_tile + r][q_element(S::COUNT, f, j)];
          UNROLL for (int t = 0; t < 8; ++t)
            c[slot_of(r, t)] = s[2 * row_tile + r][fragment_of(tile, t)].thread_elements()[element_of(tile, t)];
        }
        products.template add<true>(c, a, k[f], lane);
        UNROLL for (int r = 0; r < 2; ++r)
          UNROLL for (int t = 0; t < 8; ++t)
            s[2 * row_tile + r][fragment_of(tile, t)].thread_elements()[element_of(tile, t)] = c[slot_of(r, t)];
      }
    }
    ScoresOf<typename S::Rest>::add(s, queries, rows, tile, products, lane);
  }
};
template <int DIM, int ALIGNED, int LEAST, int FIRST>
struct ScoresOf<Slab<DIM, ALIGNED, LEAST, FIRST, 0>> {
  template <typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], thread Queries&, AnyLaneRows, int, Products, Lane) {}
};

// Line 10 for one tile of keys, likewise: o += p v. A hidden key has p = 0, but 0 * NaN is NaN, and memory that no query sees may
// hold anything. So where keys may be hidden, HIDDEN, NaN and infinities in v are replaced by 0, and NaN is put into o for those
// queries alone that see them.
template <typename S>
struct ValuesOf {
  METAL_FUNC static void product(
      thread Accumulator (&o)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread T (&v)[2][16],
      int row_tile,
      int tile,
      Products products,
      Lane lane) {
    float c[16];
    UNROLL for (int r = 0; r < 2; ++r)
      UNROLL for (int t = 0; t < 8; ++t)
        c[slot_of(r, t)] = o[2 * row_tile + r][S::BEGIN / 8 + t / 2].thread_elements()[t % 2];
    UNROLL for (int half_tile = 0; half_tile < 2; ++half_tile) {
      T a[8];
      UNROLL for (int r = 0; r < 2; ++r) {
        UNROLL for (int j = 0; j < 4; ++j) {
          int t = 4 * half_tile + j;
          a[4 * r + j] = p[2 * row_tile + r][fragment_of(tile, t)].thread_elements()[element_of(tile, t)];
        }
      }
      products.template add<false>(c, a, v[half_tile], lane);
    }
    UNROLL for (int r = 0; r < 2; ++r)
      UNROLL for (int t = 0; t < 8; ++t)
        o[2 * row_tile + r][S::BEGIN / 8 + t / 2].thread_elements()[t % 2] = c[slot_of(r, t)];
  }

  METAL_FUNC static void spread_nonfinite(
      thread Accumulator (&o)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      thread T (&v)[2][16],
      int tile,
      Products products,
      Lane lane) {
    T nonfinite[2][16];  // 1 where v is not finite
    UNROLL for (int i = 0; i < 32; ++i) {
      bool is_nonfinite = !isfinite(float(v[i / 16][i % 16]));
      nonfinite[i / 16][i % 16] = T(is_nonfinite ? 1.0f : 0.0f);
      if (is_nonfinite) v[i / 16][i % 16] = T(0.0f);
    }
    UNROLL for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
      float seen[16];  // how many of them each query sees, in each column
      UNROLL for (int i = 0; i < 16; ++i) seen[i] = 0.0f;
      UNROLL for (int half_tile = 0; half_tile < 2; ++half_tile) {
        T sees[8];  // 1 where the query sees the key
        UNROLL for (int i = 0; i < 8; ++i) {
          int t = 4 * half_tile + i % 4;
          sees[i] = T(is_seen(visible[2 * row_tile + i / 4], fragment_of(tile, t), element_of(tile, t)) ? 1.0f : 0.0f);
        }
        products.template add<false>(seen, sees, nonfinite[half_tile], lane);
      }
      UNROLL for (int r = 0; r < 2; ++r)
        UNROLL for (int t = 0; t < 8; ++t)
          if (seen[slot_of(r, t)] > 0.0f)
            o[2 * row_tile + r][S::BEGIN / 8 + t / 2].thread_elements()[t % 2] = NAN;
    }
  }

  template <bool HIDDEN, typename AnyLaneRows>
  METAL_FUNC static void add(
      thread Accumulator (&o)[ROW_FRAGMENTS][DV_FRAGMENTS],
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      AnyLaneRows rows,
      int tile,
      Products products,
      Lane lane) {
    T v[2][16];
    S::load_v(v, rows, 8 * tile, lane);
    if (HIDDEN) {
      float nan_if_nonfinite = 0.0f;
      UNROLL for (int i = 0; i < 32; ++i) nan_if_nonfinite += 0.0f * float(v[i / 16][i % 16]);
      if (simd_any(nan_if_nonfinite != 0.0f)) spread_nonfinite(o, visible, v, tile, products, lane);
    }
    UNROLL for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) product(o, p, v, row_tile, tile, products, lane);
    ValuesOf<typename S::Rest>::template add<HIDDEN>(o, p, visible, rows, tile, products, lane);
  }
};
template <int DIM, int ALIGNED, int LEAST, int FIRST>
struct ValuesOf<Slab<DIM, ALIGNED, LEAST, FIRST, 0>> {
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

// A simdgroup's queries, and their attention over the blocks so far.
struct State {
  Queries q;
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
  int first_row;
  Kept kept;
  Products products;

  // s += q k^T. EDGE: there may be fewer keys than the block has.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void add_qk(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], AnyKeys keys, int first_key, Lane lane) thread {
    LaneRows<EDGE, decltype(keys.k)> rows;
    rows.begin(keys.k, first_key + first_k_key(lane), keys.seqlen);
    UNROLL for (int tile = 0; tile < KEY_TILES; ++tile) ScoresOf<SlabD>::add(s, q, rows, tile, products, lane);
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
    rows.begin(keys.v, first_key + first_v_key(lane), keys.seqlen);
    simdgroup_barrier(mem_flags::mem_none);  // so that no compiler loads v while s is in registers
    UNROLL for (int tile = 0; tile < KEY_TILES; ++tile)
      ValuesOf<SlabV>::template add<HIDDEN>(o, p, visible, rows, tile, products, lane);
  }

  // s of a block, where it is there already.
  METAL_FUNC bool take_s(thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], Lane) const thread { return false; }

  // How the scores of row fragment r are made.
  METAL_FUNC Scoring scoring_of_row(Scoring scoring, int) const thread { return scoring; }
};
