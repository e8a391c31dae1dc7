// The rows that a simdgroup of the backward pass holds, as transposed right operands, and the transposition of a fragment.
//
// They lie in registers, or in threadgroup memory in the order in which lanes read them, 16 bytes at a time. There a lane
// reads only what it wrote, so there is no barrier.

constant constexpr int D_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int DV_FRAGMENTS = (HEAD_DIM_V + 7) / 8;
constant constexpr int HELD_FRAGMENTS = HELD / 8;

// What rows are aligned to by the head dim alone, at least: the kernels of the backward pass must deal out the elements of q and k
// alike, for their scores to have the same bits, and not all of them have the same buffers.
inline constexpr int aligned_by(int dim, int aligned) { return (dim & -dim) < aligned ? dim & -dim : aligned; }

typedef Slab<HEAD_DIM, aligned_by(HEAD_DIM, VECTOR)> SlabD;
typedef Slab<HEAD_DIM_V, aligned_by(HEAD_DIM_V, VECTOR_V)> SlabV;

// a: held rows of q, or of k. b: of the gradient of the output, or of v.
#if HELD_IN_REGISTERS
struct HeldOperands {
  Operand a[HELD_FRAGMENTS][D_FRAGMENTS];
  Operand b[HELD_FRAGMENTS][DV_FRAGMENTS];

  // Fragments of row fragment r, from FIRST on.
  template <bool OF_A, int FIRST, int W>
  METAL_FUNC void get(thread Operand (&to)[W], int r) const thread {
    UNROLL for (int f = 0; f < W; ++f) to[f] = OF_A ? a[r][FIRST + f] : b[r][FIRST + f];
  }
  template <bool OF_A, int FIRST, int W>
  METAL_FUNC void put(thread Operand (&from)[W], int r) thread {
    UNROLL for (int f = 0; f < W; ++f) (OF_A ? a[r][FIRST + f] : b[r][FIRST + f]) = from[f];
  }
};
#else
constant constexpr int HELD_TOGETHER = 8 / ELEMENT_BYTES;  // fragments of which a lane has 16 bytes
inline constexpr int held_groups(int fragments) { return HELD_FRAGMENTS * ((fragments + HELD_TOGETHER - 1) / HELD_TOGETHER); }
constant constexpr int HELD_GROUP = 32 * HELD_TOGETHER * 2;  // elements of all lanes

struct HeldMemory {
  alignas(16) T a[held_groups(D_FRAGMENTS) * HELD_GROUP];  // [r][group of fragments][lane][fragment of the group][2]
#if NEEDS_DP
  alignas(16) T b[held_groups(DV_FRAGMENTS) * HELD_GROUP];
#endif
};

struct HeldOperands {
  threadgroup T* a;  // this lane's part
  threadgroup T* b;

  template <bool OF_A>
  METAL_FUNC threadgroup T* at(int r, int f) const thread {
    int group = (r * held_groups(OF_A ? D_FRAGMENTS : DV_FRAGMENTS)) / HELD_FRAGMENTS + f / HELD_TOGETHER;
    return (OF_A ? a : b) + group * HELD_GROUP + f % HELD_TOGETHER * 2;
  }
  template <bool OF_A, int FIRST, int W>
  METAL_FUNC void get(thread Operand (&to)[W], int r) const thread {
    enum { N = W < HELD_TOGETHER ? W : HELD_TOGETHER };
    UNROLL for (int f = 0; f < W; f += N) {
      T x[2 * N];
      Elements<2 * N>::load(x, (threadgroup const T*)at<OF_A>(r, FIRST + f));
      UNROLL for (int i = 0; i < N; ++i) {
        to[f + i].thread_elements()[0] = x[2 * i];
        to[f + i].thread_elements()[1] = x[2 * i + 1];
      }
    }
  }
  template <bool OF_A, int FIRST, int W>
  METAL_FUNC void put(thread Operand (&from)[W], int r) thread {
    enum { N = W < HELD_TOGETHER ? W : HELD_TOGETHER };
    UNROLL for (int f = 0; f < W; f += N) {
      T x[2 * N];
      UNROLL for (int i = 0; i < N; ++i) {
        x[2 * i] = from[f + i].thread_elements()[0];
        x[2 * i + 1] = from[f + i].thread_elements()[1];
      }
      Elements<2 * N>::store(at<OF_A>(r, FIRST + f), x);
    }
  }
};
#endif

// Rows of memory become the fragments of held row fragment r, times `factor`.
template <typename S, bool OF_A>
struct Hold {
  METAL_FUNC static void run(
      thread HeldOperands& held, int r, device const T* row0, device const T* row1, float factor, Lane lane) {
    Operand x[S::W];
    S::load_transposed_slab(x, row0, row1, factor, lane);
    held.template put<OF_A, S::FRAGMENT, S::W>(x, r);
    Hold<typename S::Rest, OF_A>::run(held, r, row0, row1, factor, lane);
  }
};
template <int DIM, int ALIGNED, int FIRST, bool OF_A>
struct Hold<Slab<DIM, ALIGNED, FIRST, END>, OF_A> {
  METAL_FUNC static void run(thread HeldOperands&, int, device const T*, device const T*, float, Lane) {}
};

// The fragment transposed. In Apple's order element e of lane {b4 b3 b2 b1 b0} is element b1 of lane {b3 b4 b0 e b2}.
METAL_FUNC Operand transposed(Operand x, ushort index) {
  ushort from = (index >> 1 & 8) | (index << 1 & 16) | (index << 2 & 4) | (index >> 2 & 1);
  bool second = index & 2;
  Operand y;
#if ELEMENT_BYTES == 2
  uint both = packed(x.thread_elements()[0], x.thread_elements()[1]);
  vec<T, 2> y0 = unpacked(simd_shuffle(both, from)), y1 = unpacked(simd_shuffle(both, ushort(from | 2)));
  y.thread_elements()[0] = second ? y0.y : y0.x;
  y.thread_elements()[1] = second ? y1.y : y1.x;
#else
  // Lanes b1 = 0 and 1 exchange an element, so that a lane then has both of one column; then lanes change places.
  T got = simd_shuffle_xor(second ? x.thread_elements()[0] : x.thread_elements()[1], ushort(2));
  T z0 = second ? got : x.thread_elements()[0], z1 = second ? x.thread_elements()[1] : got;
  from |= index & 2;
  y.thread_elements()[0] = simd_shuffle(z0, from);
  y.thread_elements()[1] = simd_shuffle(z1, from);
#endif
  return y;
}
