// What the simdgroups of a threadgroup tell each other: at first q, which unit 0 reads for all; then the s of their slices, for two
// rounds by turns, so that one barrier a round is enough; after that, m, l and o of the units. A lane's two elements of a fragment
// lie together.
constant constexpr int MERGED_FRAGMENTS = ROW_FRAGMENTS * (1 + DV_FRAGMENTS);
constant constexpr int EXCHANGED = 2 * SIMDGROUPS * S_FRAGMENTS;
constant constexpr int MERGED = UNITS / 2 * SLICES * MERGED_FRAGMENTS;
constant constexpr int Q_FRAGMENTS = UNITS > 1 ? ROW_FRAGMENTS * D_FRAGMENTS : 0;

inline constexpr int largest(int a, int b) { return a > b ? a : b; }
constant constexpr int SHARED = largest(1, largest(Q_FRAGMENTS * SLICES, largest(EXCHANGED, MERGED)));

// All have unit 0's q.
METAL_FUNC void share_q(threadgroup float2* shared, thread State& state, int unit, ushort index) {
  if (UNITS == 1) return;
  threadgroup float2* place = shared + state.slice * Q_FRAGMENTS * 32 + index;
  if (unit == 0) {
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int f = 0; f < D_FRAGMENTS; ++f)
        place[(r * D_FRAGMENTS + f) * 32] =
            float2(state.q[r][f].thread_elements()[0], state.q[r][f].thread_elements()[1]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (unit > 0) {
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      UNROLL for (int f = 0; f < D_FRAGMENTS; ++f) {
        float2 x = place[(r * D_FRAGMENTS + f) * 32];
        state.q[r][f].thread_elements()[0] = T(x.x);
        state.q[r][f].thread_elements()[1] = T(x.y);
      }
    }
  }
  if (SLICES > 1) threadgroup_barrier(mem_flags::mem_threadgroup);  // until all have read
}

// s of a slice, for `State::take_s`.
METAL_FUNC void give_s(
    threadgroup float2* shared, thread Accumulator (&s)[ROW_FRAGMENTS][KEY_FRAGMENTS], int simdgroup, ushort index) {
  threadgroup float2* mine = shared + simdgroup * S_FRAGMENTS * 32 + index;
  UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
    UNROLL for (int n = 0; n < KEY_FRAGMENTS; ++n)
      mine[(r * KEY_FRAGMENTS + n) * 32] = float2(s[r][n].thread_elements()[0], s[r][n].thread_elements()[1]);
}

// m, l and o of the units, put together in those of unit 0: in a tree, as
//   m = max(m_a, m_b),  l = exp(m_a - m) l_a + exp(m_b - m) l_b,  o = exp(m_a - m) o_a + exp(m_b - m) o_b.
METAL_FUNC void merge_units(threadgroup float2* shared, thread State& state, Scoring scoring, int unit, ushort index) {
  UNROLL for (int half_of = UNITS / 2; half_of > 0; half_of /= 2) {
    threadgroup float2* place = shared + ((unit % half_of) * SLICES + state.slice) * MERGED_FRAGMENTS * 32 + index;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // until all have read what was there
    if (unit >= half_of && unit < 2 * half_of) {
      UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        place[r * (1 + DV_FRAGMENTS) * 32] = float2(state.m[r], state.l[r]);
        UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f)
          place[(r * (1 + DV_FRAGMENTS) + 1 + f) * 32] =
              float2(state.o[r][f].thread_elements()[0], state.o[r][f].thread_elements()[1]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (unit < half_of) {
      UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
        float2 other = place[r * (1 + DV_FRAGMENTS) * 32];
        float m = max(state.m[r], other.x);
        float base = m == -INFINITY ? 0.0f : m;
        float mine = exp_of_difference(state.m[r], base, scoring), its = exp_of_difference(other.x, base, scoring);
        state.m[r] = m;
        state.l[r] = mine * state.l[r] + its * other.y;
        UNROLL for (int f = 0; f < DV_FRAGMENTS; ++f) {
          float2 o = place[(r * (1 + DV_FRAGMENTS) + 1 + f) * 32];
          state.o[r][f].thread_elements()[0] = mine * state.o[r][f].thread_elements()[0] + its * o.x;
          state.o[r][f].thread_elements()[1] = mine * state.o[r][f].thread_elements()[1] + its * o.y;
        }
      }
    }
  }
}
