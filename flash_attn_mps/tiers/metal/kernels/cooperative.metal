// Matrices in registers as Metal 4 multiplies them: matmul2d of one simdgroup, 16x32x16, on cooperative tensors. In place of
// fragment.metal, and the one file that knows which lane has which of their elements.
//
// Where the elements are depends on the GPU and on the system that code is compiled for, and has changed (pytorch#191794). LAYOUT is
// what a probe found on this machine. Two layouts are known: with them operands are filled from registers. Under any other the tensors
// are asked, element by element, and operands pass through threadgroup memory.
//
// What other sources see is the same under all: a lane has one row in eight of a tile and a quarter of its columns, which are
// neighbours in memory. q k^T sums over d, and p v over keys, in any order as long as both operands agree on it, and the columns of
// v may have any order that those of the output have. So quarter n of 32 columns stands for elements 8 n to 8 n + 7 of them in
// memory, whatever columns of a fragment its lanes have.

#define LAYOUT_GENERIC 0
#define LAYOUT_APPLE10 1
#define LAYOUT_LEGACY 2
#define EXCHANGES (LAYOUT == LAYOUT_GENERIC)

#define KEYS_ARE_NEIGHBOURS 1

// A lane's two elements of an 8x8 part of a tile, by the names of simdgroup_matrix.
template <typename Element>
struct Pair {
  Element elements[2];

  METAL_FUNC thread Element* thread_elements() thread { return elements; }
};
typedef Pair<T> Operand;
typedef Pair<float> Accumulator;

METAL_FUNC Accumulator zeros() {
  Accumulator x;
  x.elements[0] = x.elements[1] = 0.0f;
  return x;
}

// A lane has 16 rows' worth of fragments in these orders. Left operand, 16x16: element j of its row r of two is slot 4 r + j.
// Destination and right operand, 16x32: that of a quarter's element t is slot_of(r, t). Right operand of q k^T, from rows of k:
// element j of K_ELEMENTS of the lane's key i of K_KEYS is k_slot(i, j). Keys and rows of v are so many keys from the lane's first.
#if LAYOUT == LAYOUT_LEGACY
// Four 8x8 fragments: quarter n has columns 2 n, 2 n + 1, 2 n + 8, 2 n + 9 of each 16.
constant constexpr int K_KEYS = 8, K_ELEMENTS = 2;
inline constexpr int slot_of(int r, int t) { return 8 * r + t; }
inline constexpr int k_slot(int i, int j) { return 8 * j + i; }
// Which of a lane's neighbours in a row of q is element j of fragment f of so many.
inline constexpr int q_element(int fragments, int f, int j) { return 2 * fragments * (j % 2) + 2 * f + j / 2; }
inline constexpr int k_key(int i) { return i; }
inline constexpr int v_key(int half_tile, int r) { return 4 * half_tile + 2 * r; }
METAL_FUNC int first_k_key(Lane lane) { return KEYS / 4 * (lane.column / 2); }
METAL_FUNC int first_v_key(Lane lane) { return KEYS / 4 * (lane.row / 2) + lane.row % 2; }
METAL_FUNC int k_part(Lane lane) { return lane.row; }  // which neighbours of a row of k the lane has
#else
// Apple10: quarter n has columns 4 n to 4 n + 3 of each 16. The generic code hands elements out likewise, and collects them.
constant constexpr int K_KEYS = 4, K_ELEMENTS = 4;
inline constexpr int slot_of(int r, int t) { return 8 * (t / 4) + 4 * r + t % 4; }
inline constexpr int k_slot(int i, int j) { return 4 * i + j; }
inline constexpr int q_element(int, int f, int j) { return 4 * f + j; }
inline constexpr int k_key(int i) { return KEYS / 2 * (i % 2) + 4 * (i / 2); }
inline constexpr int v_key(int half_tile, int r) { return KEYS / 2 * r + 4 * half_tile; }
METAL_FUNC int first_k_key(Lane lane) { return KEYS / 4 * (lane.row / 4) + lane.row % 4; }
METAL_FUNC int first_v_key(Lane lane) { return first_k_key(lane); }
METAL_FUNC int k_part(Lane lane) { return lane.column / 2; }
#endif

#if EXCHANGES
struct Exchange {
  T left[16 * 16];
  T right[16 * 32];
  float product[16 * 32];
};
#endif

struct Products {
#if EXCHANGES
  threadgroup Exchange* exchange;

  // c += a b, in slots of Apple10. Of k: b has the rows of k, which are the columns of the right operand.
  template <bool OF_K>
  METAL_FUNC void add(thread float (&c)[16], thread T (&a)[8], thread T (&b)[16], Lane lane) const thread {
    int first = 2 * lane.column;
    UNROLL for (int i = 0; i < 8; ++i) exchange->left[16 * (lane.row + 8 * (i / 4)) + first + i % 4] = a[i];
    UNROLL for (int i = 0; i < 16; ++i) {
      int long_side = first + i % 4, short_side = lane.row + 8 * (i / 4 % 2);
      int k = OF_K ? long_side : short_side, n = (OF_K ? short_side : long_side) + 16 * (i / 8);
      exchange->right[32 * k + n] = b[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
        16, 32, 16, false, false, false, mpp::tensor_ops::matmul2d_descriptor::mode::multiply);
    mpp::tensor_ops::matmul2d<descriptor, execution_simdgroup> product;
    auto left = product.template get_left_input_cooperative_tensor<T, T, float>();
    auto right = product.template get_right_input_cooperative_tensor<T, T, float>();
    auto destination =
        product.template get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
    UNROLL for (ushort i = 0; i < left.get_capacity(); ++i)
      if (left.is_valid_element(i)) {
        auto at = left.get_multidimensional_index(i);
        left[i] = exchange->left[16 * at[1] + at[0]];
      }
    UNROLL for (ushort i = 0; i < right.get_capacity(); ++i)
      if (right.is_valid_element(i)) {
        auto at = right.get_multidimensional_index(i);
        right[i] = exchange->right[32 * at[1] + at[0]];
      }
    product.run(left, right, destination);
    UNROLL for (ushort i = 0; i < destination.get_capacity(); ++i)
      if (destination.is_valid_element(i)) {
        auto at = destination.get_multidimensional_index(i);
        exchange->product[32 * at[1] + at[0]] = destination[i];
      }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int i = 0; i < 16; ++i)
      c[i] += exchange->product[32 * (lane.row + 8 * (i / 4 % 2)) + first + i % 4 + 16 * (i / 8)];
  }
#else
  // c += a b, in slots. Of k: b has the rows of k, which are the columns of the right operand.
  template <bool OF_K>
  METAL_FUNC void add(thread float (&c)[16], thread T (&a)[8], thread T (&b)[16], Lane) const thread {
    constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
        16, 32, 16, false, OF_K, false, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
    mpp::tensor_ops::matmul2d<descriptor, execution_simdgroup> product;
    auto left = product.template get_left_input_cooperative_tensor<T, T, float>();
    auto right = product.template get_right_input_cooperative_tensor<T, T, float>();
    auto destination =
        product.template get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
    UNROLL for (int i = 0; i < 8; ++i) left[i] = a[i];
    UNROLL for (int i = 0; i < 16; ++i) right[i] = b[i];
    UNROLL for (int i = 0; i < 16; ++i) destination[i] = c[i];
    product.run(left, right, destination);
    UNROLL for (int i = 0; i < 16; ++i) c[i] = destination[i];
  }
#endif
};

// Columns FIRST and up of rows of DIM elements, those of FRAGMENTS fragments of 16: two, or what is left, LEAST at least; none at
// the end. Rows are aligned to ALIGNED elements. What lies beyond the row is zero.
inline constexpr int slab_fragments(int left, int least) { return left <= 0 ? 0 : left > 16 ? 2 : least; }

template <int DIM, int ALIGNED, int LEAST, int FIRST = 0, int FRAGMENTS = slab_fragments(DIM - FIRST, LEAST)>
struct Slab {
  enum { COUNT = FRAGMENTS, BEGIN = FIRST, WIDTH = 16 * FRAGMENTS, ELEMENTS = 4 * FRAGMENTS, K_WIDTH = K_ELEMENTS * FRAGMENTS };
  typedef Slab<DIM, ALIGNED, LEAST, FIRST + WIDTH> Rest;

  // Does a row have all neighbours `first` to `first + N - 1`, or none of them?
  template <int N>
  METAL_FUNC static bool is_in(int first) { return FIRST + WIDTH <= DIM || first < DIM; }
  template <int N>
  METAL_FUNC static constexpr bool in_whole() { return FIRST + WIDTH <= DIM || DIM % N == 0; }

  // Part n, N neighbours, of the slab's columns of a row.
  template <int N, typename Row>
  METAL_FUNC static void load(thread T* to, Row row, int n) {
    constexpr int W = N < ALIGNED ? N : ALIGNED;
    int first = FIRST + N * n;
    if (in_whole<N>() && is_in<N>(first)) {
      UNROLL for (int i = 0; i < N; i += W) Elements<W>::load(to + i, row + first + i);
    } else {
      UNROLL for (int i = 0; i < N; ++i) {
        to[i] = T(0.0f);
        if (!in_whole<N>() && first + i < DIM) Elements<1>::load(to + i, row + first + i);
      }
    }
  }

  // The lane's quarter of a row of q, times `factor`, which is exact for 1, -1 and 0.
  METAL_FUNC static void load_q(thread T* to, device const T* row, float factor, Lane lane) {
    load<ELEMENTS>(to, row, lane.column / 2);
    UNROLL for (int i = 0; i < ELEMENTS; ++i) to[i] = T(float(to[i]) * factor);
  }

  // Right operands of a tile of 32 keys of k, which begins so many keys behind the first of `rows`.
  template <typename AnyLaneRows>
  METAL_FUNC static void load_k(thread T (&to)[FRAGMENTS][16], AnyLaneRows rows, int tile, Lane lane) {
    UNROLL for (int i = 0; i < K_KEYS; ++i) {
      T x[K_WIDTH];
      load<K_WIDTH>(x, rows.at(tile + k_key(i)), k_part(lane));
      UNROLL for (int f = 0; f < FRAGMENTS; ++f)
        UNROLL for (int j = 0; j < K_ELEMENTS; ++j) to[f][k_slot(i, j)] = x[K_ELEMENTS * f + j];
    }
  }

  // Likewise of v: of each half of the keys.
  template <typename AnyLaneRows>
  METAL_FUNC static void load_v(thread T (&to)[2][16], AnyLaneRows rows, int tile, Lane lane) {
    UNROLL for (int half_tile = 0; half_tile < 2; ++half_tile) {
      UNROLL for (int r = 0; r < 2; ++r) {
        T x[ELEMENTS];
        load<ELEMENTS>(x, rows.at(tile + v_key(half_tile, r)), lane.column / 2);
        UNROLL for (int t = 0; t < ELEMENTS; ++t) to[half_tile][slot_of(r, t)] = x[t];
      }
    }
  }

  // A row of a result whose columns are those of v, times `factor`.
  METAL_FUNC static void store(device T* row, thread Accumulator* from, float factor, Lane lane) {
    constexpr int N = ELEMENTS, W = N < ALIGNED ? N : ALIGNED;
    T x[N];
    UNROLL for (int t = 0; t < N; ++t) x[t] = T(from[FIRST / 8 + t / 2].thread_elements()[t % 2] * factor);
    int first = FIRST + N * (lane.column / 2);
    if (in_whole<N>() && is_in<N>(first)) {
      UNROLL for (int i = 0; i < N; i += W) Elements<W>::store(row + first + i, x + i);
    } else if (!in_whole<N>()) {
      UNROLL for (int i = 0; i < N; ++i) if (first + i < DIM) row[first + i] = x[i];
    }
    Rest::store(row, from, factor, lane);
  }
};

template <int DIM, int ALIGNED, int LEAST, int FIRST>
struct Slab<DIM, ALIGNED, LEAST, FIRST, 0> {
  METAL_FUNC static void store(device T*, thread Accumulator*, float, Lane) {}
};
