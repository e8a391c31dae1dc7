// 8x8 fragments in registers, filled by vector loads and never transposed.
//
// In Apple's lane order a lane has one row and two neighbouring columns of a fragment. The product q k^T sums over d in any
// order as long as q and k agree on it: so fragment f of a slab of W fragments takes not the columns 8f to 8f+7 of the head
// dim but every W-th one, d = first + W * c + f. A lane's elements of all W fragments are then neighbours in memory, for the
// left operand (2 W of them in one row) and for the right one (W in each of two rows). The columns of v, and so of the
// output, go to fragments in the same way. W is the largest power of two that the head dim has fragments for and the alignment
// of rows allows.

typedef simdgroup_matrix<T, 8, 8> Operand;
typedef simdgroup_matrix<float, 8, 8> Accumulator;

// Has a lane 2 KEY_FRAGMENTS neighbouring keys of a block (masking.metal)? Else two in each of its fragments.
#define KEYS_ARE_NEIGHBOURS HAS_MASK

// The same number, which all lanes of the simdgroup have. To compilers it is another: what is computed from it is computed
// where it is needed, and does not wait in registers for loops to end.
METAL_FUNC int anew(int x) { return simd_broadcast_first(x); }
METAL_FUNC Lane anew(Lane lane) { return lane_of(simd_shuffle_xor(lane.index, ushort(0))); }

METAL_FUNC Accumulator zeros() {
  return make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

inline constexpr int slab_width(int fragments, int most) {
  return fragments >= 8 && most >= 8 ? 8 : fragments >= 4 && most >= 4 ? 4 : fragments >= 2 && most >= 2 ? 2 : 1;
}

// What begins at fragment FIRST of a row: fragments that are whole, one that the head dim does not fill, or nothing.
enum SlabKind { WHOLE, RAGGED, END };
inline constexpr int slab_kind(int dim, int first) {
  return first < dim / 8 ? WHOLE : 8 * first < dim ? RAGGED : END;
}

// Fragments FIRST and up of rows of DIM elements. Rows are aligned to ALIGNED elements. The functions that end in _slab
// load those of this slab alone, to where the array of its fragments begins.
template <int DIM, int ALIGNED, int FIRST = 0, int KIND = slab_kind(DIM, FIRST)>
struct Slab {
  enum { W = slab_width(DIM / 8 - FIRST, ALIGNED), BEGIN = 8 * FIRST, FRAGMENT = FIRST };
  typedef Slab<DIM, ALIGNED, FIRST + W> Rest;

  // Left operand: `row` is this lane's row. Its elements are multiplied by `factor`, which is exact for 1, -1 and 0.
  METAL_FUNC static void load_left(thread Operand* to, device const T* row, float factor, Lane lane) {
    T x[2 * W];
    Elements<W>::load(x, row + BEGIN + W * lane.column);
    Elements<W>::load(x + W, row + BEGIN + W * lane.column + W);
    UNROLL for (int f = 0; f < W; ++f) {
      to[FIRST + f].thread_elements()[0] = T(float(x[f]) * factor);
      to[FIRST + f].thread_elements()[1] = T(float(x[W + f]) * factor);
    }
    Rest::load_left(to, row, factor, lane);
  }

  // Right operand, transposed: the rows in memory are the columns of the fragment, and a lane has two of them.
  template <typename Row>
  METAL_FUNC static void load_right_transposed(thread Operand* to, Row row0, Row row1, Lane lane) {
    int begin = right_transposed_begin(lane);
    load_right_transposed_from<W, 0>(to + FIRST, row0 + begin, row1 + begin, lane);
    Rest::load_right_transposed(to, row0, row1, lane);
  }
  // COUNT fragments of the slab, from PART on, of rows moved by `right_transposed_begin`, a distance that all rows share.
  METAL_FUNC static int right_transposed_begin(Lane lane) { return W * lane.row; }
  template <int COUNT, int PART, typename Row>
  METAL_FUNC static void load_right_transposed_from(thread Operand* to, Row row0, Row row1, Lane) {
    T x[COUNT], y[COUNT];
    Elements<COUNT>::load(x, row0 + (BEGIN + PART));
    Elements<COUNT>::load(y, row1 + (BEGIN + PART));
    UNROLL for (int f = 0; f < COUNT; ++f) {
      to[f].thread_elements()[0] = x[f];
      to[f].thread_elements()[1] = y[f];
    }
  }

  // Right operand: `row` is this lane's row.
  template <typename Row>
  METAL_FUNC static void load_right(thread Operand* to, Row row, Lane lane) {
    load_right_slab(to + FIRST, row, lane);
    Rest::load_right(to, row, lane);
  }
  template <typename Row>
  METAL_FUNC static void load_right_slab(thread Operand* to, Row row, Lane lane) {
    load_right_slab_from(to, row + right_begin(lane), lane);
  }
  // Of a row moved by `right_begin`.
  METAL_FUNC static int right_begin(Lane lane) { return W * lane.column; }
  template <typename Row>
  METAL_FUNC static void load_right_slab_from(thread Operand* to, Row row, Lane) {
    T x[2 * W];
    Elements<W>::load(x, row + BEGIN);
    Elements<W>::load(x + W, row + (BEGIN + W));
    UNROLL for (int f = 0; f < W; ++f) {
      to[f].thread_elements()[0] = x[2 * f];
      to[f].thread_elements()[1] = x[2 * f + 1];
    }
  }

  // Right operand, transposed, with its elements dealt out as load_right_slab does: for a product that sums over d with what
  // that loads as the left operand. Elements are multiplied by `factor`, which is exact for 1, -1 and 0.
  METAL_FUNC static void load_transposed_slab(
      thread Operand* to, device const T* row0, device const T* row1, float factor, Lane lane) {
    int even = lane.row & ~1, odd = lane.row & 1;
    T x[2 * W], y[2 * W];
    UNROLL for (int half_row = 0; half_row < 2; ++half_row) {
      Elements<W>::load(x + half_row * W, row0 + BEGIN + W * (even + half_row));
      Elements<W>::load(y + half_row * W, row1 + BEGIN + W * (even + half_row));
    }
    UNROLL for (int f = 0; f < W; ++f) {
      to[f].thread_elements()[0] = T(float(odd ? x[2 * f + 1] : x[2 * f]) * factor);
      to[f].thread_elements()[1] = T(float(odd ? y[2 * f + 1] : y[2 * f]) * factor);
    }
  }

  // This lane's part of the product of two rows: the four lanes of a row are to be added.
  METAL_FUNC static float dot(device const T* a, device const T* b, Lane lane) {
    T x[2 * W], y[2 * W];
    UNROLL for (int half_row = 0; half_row < 2; ++half_row) {
      Elements<W>::load(x + half_row * W, a + BEGIN + W * (lane.column + half_row));
      Elements<W>::load(y + half_row * W, b + BEGIN + W * (lane.column + half_row));
    }
    float sum = 0.0f;
    UNROLL for (int i = 0; i < 2 * W; ++i) sum = fma(float(x[i]), float(y[i]), sum);
    return sum + Rest::dot(a, b, lane);
  }

  // A result whose columns are those of a right operand, times `factor`.
  template <typename Out>
  METAL_FUNC static void store(device Out* row, thread Accumulator* from, float factor, Lane lane) {
    Out x[2 * W];
    UNROLL for (int f = 0; f < W; ++f) {
      x[2 * f] = Out(from[FIRST + f].thread_elements()[0] * factor);
      x[2 * f + 1] = Out(from[FIRST + f].thread_elements()[1] * factor);
    }
    store_elements<W>(row + BEGIN + W * lane.column, x);
    store_elements<W>(row + BEGIN + W * lane.column + W, x + W);
    Rest::store(row, from, factor, lane);
  }
};

// What a head dim that is no multiple of 8 leaves: one fragment, element by element, zero beyond the row.
template <int DIM, int ALIGNED, int FIRST>
struct Slab<DIM, ALIGNED, FIRST, RAGGED> {
  enum { W = 1, BEGIN = 8 * FIRST, FRAGMENT = FIRST };
  typedef Slab<DIM, ALIGNED, FIRST + 1> Rest;

  template <typename Row>
  METAL_FUNC static T at(Row row, int d) {
    T x = T(0);
    if (d < DIM) Elements<1>::load(&x, row + d);
    return x;
  }

  METAL_FUNC static void load_left(thread Operand* to, device const T* row, float factor, Lane lane) {
    to[FIRST].thread_elements()[0] = T(float(at(row, BEGIN + lane.column)) * factor);
    to[FIRST].thread_elements()[1] = T(float(at(row, BEGIN + lane.column + 1)) * factor);
  }
  template <typename Row>
  METAL_FUNC static void load_right_transposed(thread Operand* to, Row row0, Row row1, Lane lane) {
    load_right_transposed_from<1, 0>(to + FIRST, row0, row1, lane);
  }
  METAL_FUNC static int right_transposed_begin(Lane) { return 0; }
  template <int COUNT, int PART, typename Row>
  METAL_FUNC static void load_right_transposed_from(thread Operand* to, Row row0, Row row1, Lane lane) {
    to[0].thread_elements()[0] = at(row0, BEGIN + lane.row);
    to[0].thread_elements()[1] = at(row1, BEGIN + lane.row);
  }
  template <typename Row>
  METAL_FUNC static void load_right(thread Operand* to, Row row, Lane lane) {
    load_right_slab(to + FIRST, row, lane);
  }
  template <typename Row>
  METAL_FUNC static void load_right_slab(thread Operand* to, Row row, Lane lane) {
    load_right_slab_from(to, row, lane);
  }
  METAL_FUNC static int right_begin(Lane) { return 0; }
  template <typename Row>
  METAL_FUNC static void load_right_slab_from(thread Operand* to, Row row, Lane lane) {
    to[0].thread_elements()[0] = at(row, BEGIN + lane.column);
    to[0].thread_elements()[1] = at(row, BEGIN + lane.column + 1);
  }
  METAL_FUNC static void load_transposed_slab(
      thread Operand* to, device const T* row0, device const T* row1, float factor, Lane lane) {
    to[0].thread_elements()[0] = T(float(at(row0, BEGIN + lane.row)) * factor);
    to[0].thread_elements()[1] = T(float(at(row1, BEGIN + lane.row)) * factor);
  }
  METAL_FUNC static float dot(device const T* a, device const T* b, Lane lane) {
    int d = BEGIN + lane.column;
    return float(at(a, d)) * float(at(b, d)) + float(at(a, d + 1)) * float(at(b, d + 1));
  }
  template <typename Out>
  METAL_FUNC static void store(device Out* row, thread Accumulator* from, float factor, Lane lane) {
    UNROLL for (int i = 0; i < 2; ++i)
      if (BEGIN + lane.column + i < DIM) row[BEGIN + lane.column + i] = Out(from[FIRST].thread_elements()[i] * factor);
  }
};

template <int DIM, int ALIGNED, int FIRST>
struct Slab<DIM, ALIGNED, FIRST, END> {
  METAL_FUNC static void load_left(thread Operand*, device const T*, float, Lane) {}
  template <typename Row>
  METAL_FUNC static void load_right_transposed(thread Operand*, Row, Row, Lane) {}
  template <typename Row>
  METAL_FUNC static void load_right(thread Operand*, Row, Lane) {}
  METAL_FUNC static float dot(device const T*, device const T*, Lane) { return 0.0f; }
  template <typename Out>
  METAL_FUNC static void store(device Out*, thread Accumulator*, float, Lane) {}
};
