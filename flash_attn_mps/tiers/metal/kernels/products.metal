// The products of the backward pass, slab by slab, so that fragments live no longer than they are needed.

// x += passing held^T, slab by slab. With KEEPS the passing fragments are left in `kept`.
template <typename S, bool OF_A, bool KEEPS>
struct Product {
  template <typename Row>
  METAL_FUNC static void run(
      thread Accumulator (&x)[HELD_FRAGMENTS], thread HeldOperands& held, Row row, thread Operand* kept, Lane lane) {
    Operand passing[S::W];
    S::load_right_slab(passing, row, lane);
    if (KEEPS) UNROLL for (int f = 0; f < S::W; ++f) kept[S::FRAGMENT + f] = passing[f];
    UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r) {
      Operand right[S::W];
      held.template get<OF_A, S::FRAGMENT, S::W>(right, r);
      UNROLL for (int f = 0; f < S::W; ++f) simdgroup_multiply_accumulate(x[r], passing[f], right[f], x[r]);
    }
    Product<typename S::Rest, OF_A, KEEPS>::run(x, held, row, kept, lane);
  }
};
template <int DIM, int ALIGNED, int FIRST, bool OF_A, bool KEEPS>
struct Product<Slab<DIM, ALIGNED, FIRST, END>, OF_A, KEEPS> {
  template <typename Row>
  METAL_FUNC static void run(thread Accumulator (&)[HELD_FRAGMENTS], thread HeldOperands&, Row, thread Operand*, Lane) {}
};

// to += w passing, w being a left operand. KEPT: the passing fragments are in `kept`. With `tested` a lane that has `cleans` takes
// elements that are not finite for zero, since 0 * NaN is NaN.
template <typename S, int FRAGMENTS, bool KEPT>
struct Gather {
  template <typename Row>
  METAL_FUNC static void run(
      thread Accumulator (&to)[HELD_FRAGMENTS][FRAGMENTS], thread Operand (&w)[HELD_FRAGMENTS], Row row,
      thread Operand* kept, bool tested, bool cleans, Lane lane) {
    Operand passing[S::W];
    if (KEPT) {
      UNROLL for (int f = 0; f < S::W; ++f) passing[f] = kept[S::FRAGMENT + f];
    } else {
      S::load_right_slab(passing, row, lane);
    }
    if (tested) {
      UNROLL for (int f = 0; f < S::W; ++f)
        UNROLL for (int i = 0; i < 2; ++i)
          if (cleans && !isfinite(float(passing[f].thread_elements()[i]))) passing[f].thread_elements()[i] = T(0.0f);
    }
    UNROLL for (int f = 0; f < S::W; ++f)
      UNROLL for (int r = 0; r < HELD_FRAGMENTS; ++r)
        simdgroup_multiply_accumulate(to[r][S::FRAGMENT + f], w[r], passing[f], to[r][S::FRAGMENT + f]);
    Gather<typename S::Rest, FRAGMENTS, KEPT>::run(to, w, row, kept, tested, cleans, lane);
  }
};
template <int DIM, int ALIGNED, int FIRST, int FRAGMENTS, bool KEPT>
struct Gather<Slab<DIM, ALIGNED, FIRST, END>, FRAGMENTS, KEPT> {
  template <typename Row>
  METAL_FUNC static void run(
      thread Accumulator (&)[HELD_FRAGMENTS][FRAGMENTS], thread Operand (&)[HELD_FRAGMENTS], Row, thread Operand*, bool, bool, Lane) {}
};
