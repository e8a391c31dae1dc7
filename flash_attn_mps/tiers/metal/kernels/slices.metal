// The tile of rows that the simdgroups of a unit hold, each a slice of the head dims.

constant constexpr int SIMDGROUPS = UNITS * SLICES;

inline constexpr int slice_fragments(int dim) { return ((dim + 7) / 8 + SLICES - 1) / SLICES; }
inline constexpr bool in_even_slices(int dim) { return SLICES == 1 || dim % (8 * SLICES) == 0; }

// A simdgroup's slice of rows of DIM elements, as fragments: those of a `Slab`; or, where DIM has no even slices, element by
// element, zero beyond the row.
template <int DIM, int ALIGNED, bool EVEN = in_even_slices(DIM)>
struct Slice {
  enum { FRAGMENTS = slice_fragments(DIM), WIDTH = SLICES == 1 ? DIM : DIM / SLICES };
  typedef Slab<WIDTH, ALIGNED> Whole;

  METAL_FUNC static void load_left(thread Operand* to, device const T* row, int slice, float factor, Lane lane) {
    Whole::load_left(to, row + slice * WIDTH, factor, lane);
  }
  template <typename Row>
  METAL_FUNC static void load_right_transposed(thread Operand* to, Row row0, Row row1, int slice, Lane lane) {
    Whole::load_right_transposed(to, row0 + slice * WIDTH, row1 + slice * WIDTH, lane);
  }
  template <typename Row>
  METAL_FUNC static void load_right(thread Operand* to, Row row, int slice, Lane lane) {
    Whole::load_right(to, row + slice * WIDTH, lane);
  }
  template <typename Out>
  METAL_FUNC static void store(device Out* row, thread Accumulator* from, int slice, float factor, Lane lane) {
    Whole::store(row + slice * WIDTH, from, factor, lane);
  }
};

template <int DIM, int ALIGNED>
struct Slice<DIM, ALIGNED, false> {
  enum { FRAGMENTS = slice_fragments(DIM) };

  template <typename Row>
  METAL_FUNC static T at(Row row, int d) {
    T x[1] = {T(0.0f)};
    if (d < DIM) Elements<1>::load(x, row + d);
    return x[0];
  }
  METAL_FUNC static int first(int slice, int f) { return 8 * (slice * FRAGMENTS + f); }

  METAL_FUNC static void load_left(thread Operand* to, device const T* row, int slice, float factor, Lane lane) {
    UNROLL for (int f = 0; f < FRAGMENTS; ++f)
      UNROLL for (int e = 0; e < 2; ++e)
        to[f].thread_elements()[e] = T(float(at(row, first(slice, f) + lane.column + e)) * factor);
  }
  template <typename Row>
  METAL_FUNC static void load_right_transposed(thread Operand* to, Row row0, Row row1, int slice, Lane lane) {
    UNROLL for (int f = 0; f < FRAGMENTS; ++f) {
      to[f].thread_elements()[0] = at(row0, first(slice, f) + lane.row);
      to[f].thread_elements()[1] = at(row1, first(slice, f) + lane.row);
    }
  }
  template <typename Row>
  METAL_FUNC static void load_right(thread Operand* to, Row row, int slice, Lane lane) {
    UNROLL for (int f = 0; f < FRAGMENTS; ++f)
      UNROLL for (int e = 0; e < 2; ++e) to[f].thread_elements()[e] = at(row, first(slice, f) + lane.column + e);
  }
  template <typename Out>
  METAL_FUNC static void store(device Out* row, thread Accumulator* from, int slice, float factor, Lane lane) {
    UNROLL for (int f = 0; f < FRAGMENTS; ++f)
      UNROLL for (int e = 0; e < 2; ++e) {
        int d = first(slice, f) + lane.column + e;
        if (d < DIM) row[d] = Out(from[f].thread_elements()[e] * factor);
      }
  }
};

typedef Slice<HEAD_DIM, VECTOR> SliceD;
typedef Slice<HEAD_DIM_V, VECTOR_V> SliceV;
constant constexpr int D_FRAGMENTS = SliceD::FRAGMENTS;
constant constexpr int DV_FRAGMENTS = SliceV::FRAGMENTS;

// The keys of one block, for all lanes together. Pages are looked up by a lane for each key.
#if HAS_BLOCK_TABLE
struct BlockRows {
  device const KV_T* base;
  long page_stride;
  long row_stride;
  int first_key;
  int page;  // of key first_key + the lane's index
  int row;   // in that page

  METAL_FUNC device const KV_T* at(int key) const thread {
    ushort lane = ushort(key - first_key);
    return base + simd_shuffle(page, lane) * page_stride + simd_shuffle(row, lane) * row_stride;
  }
};

struct BlockKeys {
  BlockRows k;
  BlockRows v;
  int seqlen;
};

METAL_FUNC BlockRows rows_of_block(Rows rows, int first_key, int page, int row) {
  BlockRows block;
  block.base = rows.base;
  block.page_stride = rows.page_stride;
  block.row_stride = rows.row_stride;
  block.first_key = first_key;
  block.page = page;
  block.row = row;
  return block;
}

METAL_FUNC BlockKeys keys_of_block(Keys keys, int first_key, ushort index) {
  int key = first_key + int(index), page = 0, row = 0;
  if (index < KEYS && key < keys.seqlen) {
#if HAS_LEFTPAD_K
    key += keys.k.first;
#endif
    page = keys.k.pages[key / keys.k.page_size];
    row = key % keys.k.page_size;
  }
  BlockKeys block;
  block.k = rows_of_block(keys.k, first_key, page, row);
  block.v = rows_of_block(keys.v, first_key, page, row);
  block.seqlen = keys.seqlen;
  return block;
}
#else
typedef Keys BlockKeys;

METAL_FUNC BlockKeys keys_of_block(Keys keys, int first_key, ushort index) { return keys; }
#endif

METAL_FUNC void clear(thread Operand* x, int fragments) {
  UNROLL for (int f = 0; f < fragments; ++f) x[f].thread_elements()[0] = x[f].thread_elements()[1] = T(0.0f);
}

// Fragments of s that the slices of a unit add up in threadgroup memory, where a lane's two elements lie together.
constant constexpr int S_FRAGMENTS = SLICES > 1 ? ROW_FRAGMENTS * KEY_FRAGMENTS : 0;

// A tile's rows, and their attention over a unit's blocks so far: the slice of one simdgroup.
struct State {
  Operand q[ROW_FRAGMENTS][D_FRAGMENTS];
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
#if HAS_ALIBI_SLOPES
  float alibi_slope[ROW_FRAGMENTS];
#endif
  int first_row;
  int slice;
#if SLICES > 1
  threadgroup const float2* unit_s;  // S_FRAGMENTS of each slice
#endif
  Kept kept;

  // Fragment n of a block of k. EDGE: there may be fewer keys than the block has; those past the end are not read.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void load_k(thread Operand* to, AnyKeys keys, int first_key, int n, Lane lane) const thread {
    int key0 = key_of(first_key, n, lane.column, 0);
    int key1 = key_of(first_key, n, lane.column, 1);
    bool exists = !EDGE || key0 < keys.seqlen;
    if (EDGE) {
      key0 = min(key0, keys.seqlen - 1);
      key1 = min(key1, keys.seqlen - 1);
      clear(to, D_FRAGMENTS);
    }
    device const KV_T* row0 = keys.k.at(key0);
    device const KV_T* row1 = keys.k.at(key1);
    if (exists) SliceD::load_right_transposed(to, row0, row1, slice, lane);
  }

  // Likewise of v.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void load_v(thread Operand* to, AnyKeys keys, int first_key, int n, Lane lane) const thread {
    int key = key_of(first_key, n, lane.row, 0);
    bool exists = !EDGE || key < keys.seqlen;
    if (EDGE) {
      key = min(key, keys.seqlen - 1);
      clear(to, DV_FRAGMENTS);
    }
    device const KV_T* row = keys.v.at(key);
    if (exists) SliceV::load_right(to, row, slice, lane);
  }

  // What attend.metal asks for: s += q k^T, and o += p v. HIDDEN: some of the keys may be hidden.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void add_qk(
      thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], AnyKeys keys, int first_key, Lane lane) thread {
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      Operand k[D_FRAGMENTS];
      load_k<EDGE>(k, keys, first_key, n, lane);
      UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
        UNROLL for (int f = 0; f < D_FRAGMENTS; ++f) simdgroup_multiply_accumulate(s[r][n], q[r][f], k[f], s[r][n]);
    }
  }
  template <bool EDGE, bool HIDDEN, typename AnyKeys>
  METAL_FUNC void add_block_pv(
      thread Operand (&p)[ROW_FRAGMENTS][KEY_FRAGMENTS],
      thread ushort (&visible)[ROW_FRAGMENTS],
      AnyKeys keys,
      int first_key,
      Lane lane) thread {
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      Operand v[DV_FRAGMENTS];
      load_v<EDGE>(v, keys, first_key, n, lane);
      add_pv<HIDDEN, 0>(o, p, visible, v, n);
    }
  }

  // s of a block from its slices, which all add in the same order: they must agree.
  METAL_FUNC bool take_s(thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], Lane lane) const thread {
#if SLICES > 1
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n) {
        threadgroup const float2* first = unit_s + (r * KEY_FRAGMENTS + n) * 32 + lane.index;
        float2 sum = first[0];
        UNROLL for (int other = 1; other < SLICES; ++other) sum += first[other * S_FRAGMENTS * 32];
        s[r][n].thread_elements()[0] = sum.x;
        s[r][n].thread_elements()[1] = sum.y;
      }
    }
#endif
    return SLICES > 1;
  }

  // How the scores of row fragment r are made.
  METAL_FUNC Scoring scoring_of_row(Scoring scoring, int r) const thread {
#if HAS_ALIBI_SLOPES
    scoring.alibi_slope = alibi_slope[r];
#endif
    return scoring;
  }
};
