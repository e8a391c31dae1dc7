// A simdgroup's queries: in registers, or in threadgroup memory where the head dim leaves no room for them (SHARED_Q). There
// a lane reads what it has written itself, so that no barrier is needed.

constant constexpr int D_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int DV_FRAGMENTS = (HEAD_DIM_V + 7) / 8;

typedef Slab<HEAD_DIM, VECTOR> SlabD;
typedef Slab<HEAD_DIM_V, VECTOR_V> SlabV;

#if SHARED_Q
constant constexpr int Q_ELEMENTS = ROWS * D_FRAGMENTS * 8;

struct QueryMemory {
  alignas(16) T elements[SIMDGROUPS][Q_ELEMENTS];
};

template <typename S>
struct QueriesOf {
  // Of a slab of row fragment r. Halves of the lanes' elements lie together, and so on different banks.
  METAL_FUNC static threadgroup T* half_of(threadgroup T* elements, int r, int half_index, Lane lane) {
    return elements + 64 * (r * D_FRAGMENTS + S::FRAGMENT) + S::W * (32 * half_index + lane.index);
  }
  METAL_FUNC static void store(threadgroup T* elements, int r, thread Operand* from, Lane lane) {
    T x[2 * S::W];
    UNROLL for (int i = 0; i < 2 * S::W; ++i) x[i] = from[S::FRAGMENT + i / 2].thread_elements()[i % 2];
    UNROLL for (int i = 0; i < 2; ++i) Elements<S::W>::store(half_of(elements, r, i, lane), x + i * S::W);
    QueriesOf<typename S::Rest>::store(elements, r, from, lane);
  }
  // COUNT of its fragments, from PART on.
  template <int PART, int COUNT>
  METAL_FUNC static void load(thread Operand* to, threadgroup T* elements, int r, Lane lane) {
    T x[2 * COUNT];
    if (COUNT == S::W) {
      UNROLL for (int i = 0; i < 2; ++i) Elements<COUNT>::load(x + i * COUNT, half_of(elements, r, i, lane));
    } else {
      Elements<COUNT>::load(x, half_of(elements, r, PART > 0, lane));
      Elements<COUNT>::load(x + COUNT, half_of(elements, r, PART > 0, lane) + COUNT);
    }
    UNROLL for (int i = 0; i < 2 * COUNT; ++i) to[i / 2].thread_elements()[i % 2] = x[i];
  }
};
template <int DIM, int ALIGNED, int FIRST>
struct QueriesOf<Slab<DIM, ALIGNED, FIRST, END>> {
  METAL_FUNC static void store(threadgroup T*, int, thread Operand*, Lane) {}
};

struct Queries {
  threadgroup T* elements;

  METAL_FUNC void load(int r, device const T* row, float factor, Lane lane) thread {
    Operand fragments[D_FRAGMENTS];
    SlabD::load_left(fragments, row, factor, lane);
    QueriesOf<SlabD>::store(elements, r, fragments, lane);
  }
  // COUNT fragments of a slab, from PART on.
  template <typename S, int PART, int COUNT>
  METAL_FUNC void slab(thread Operand* to, int r, Lane lane) const thread {
    QueriesOf<S>::template load<PART, COUNT>(to, elements, r, lane);
  }
};
#else
struct Queries {
  Operand fragments[ROW_FRAGMENTS][D_FRAGMENTS];

  METAL_FUNC void load(int r, device const T* row, float factor, Lane lane) thread {
    SlabD::load_left(fragments[r], row, factor, lane);
  }
  template <typename S, int PART, int COUNT>
  METAL_FUNC void slab(thread Operand* to, int r, Lane) const thread {
    UNROLL for (int f = 0; f < COUNT; ++f) to[f] = fragments[r][S::FRAGMENT + PART + f];
  }
};
#endif
