// A block of k and v, or of other rows, in threadgroup memory, for GPUs whose first-level cache is too small to share rows between simdgroups.

#if STAGED
// Elements from one row to the next: 16 bytes more than the row has, to keep neighbouring rows off the same bank.
constant constexpr int STAGED_K_ROW = (HEAD_DIM + 7) / 8 * 8 + 16 / ELEMENT_BYTES;
constant constexpr int STAGED_V_ROW = (HEAD_DIM_V + 7) / 8 * 8 + 16 / ELEMENT_BYTES;

// A block of rows in threadgroup memory. The rows of a fragment are read together: neighbouring ones keep them off the same
// bank. A fragment has every STEP-th row: with STEP 1 eight neighbours.
template <int STAGED_ROW, int STEP>
struct StagedRows {
  threadgroup const T* base;
  int first;  // the row that they begin with

  METAL_FUNC static int slot_of(uint row) { return row % STEP * 8 + row / STEP; }
  METAL_FUNC threadgroup const T* at(int row) const thread { return base + slot_of(row - first) * STAGED_ROW; }

  // As of Rows, for a row of the first fragment.
  METAL_FUNC StagedRows from(int row) const thread {
    StagedRows rows;
    rows.base = at(row);
    rows.first = 0;
    return rows;
  }
};

inline constexpr int copy_width(int dim, int aligned) {
  return dim % 8 == 0 && aligned >= 8 ? 8 : dim % 4 == 0 && aligned >= 4 ? 4 : dim % 2 == 0 && aligned >= 2 ? 2 : 1;
}

// COUNT rows of DIM elements, from `first` on, by all threads of the group; the last row stands for those past the end.
template <int COUNT, int DIM, int ALIGNED, int STAGED_ROW, int STEP>
METAL_FUNC void copy_rows(threadgroup T* to, Rows from, int first, int seqlen, ushort thread_index) {
  constexpr int W = copy_width(DIM, ALIGNED);
  constexpr int PIECES = DIM / W;
  for (int i = thread_index; i < COUNT * PIECES; i += 32 * SIMDGROUPS) {
    int row = i / PIECES, piece = i % PIECES;
    T x[W];
    Elements<W>::load(x, from.at(min(first + row, seqlen - 1)) + piece * W);
    Elements<W>::store(to + StagedRows<STAGED_ROW, STEP>::slot_of(row) * STAGED_ROW + piece * W, x);
  }
}

#if HAS_MASK
// BlockFlags.visible of each simdgroup, for two runs by turns, so that one barrier is enough.
typedef uint Votes[2][SIMDGROUPS];
#endif

template <int COUNT, int STEP>
struct Staging {
  alignas(16) T k[COUNT * STAGED_K_ROW];
  alignas(16) T v[COUNT * STAGED_V_ROW];
#if HAS_MASK
  Votes votes;
#endif
};

template <int COUNT, int STEP>
METAL_FUNC void stage_block(
    threadgroup Staging<COUNT, STEP>& staging, Rows k, Rows v, int first, int seqlen, ushort thread_index) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // until all have read the block before
  copy_rows<COUNT, HEAD_DIM, VECTOR, STAGED_K_ROW, STEP>(staging.k, k, first, seqlen, thread_index);
  copy_rows<COUNT, HEAD_DIM_V, VECTOR_V, STAGED_V_ROW, STEP>(staging.v, v, first, seqlen, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

#if HAS_MASK
// The blocks of a run, a bit each, that any simdgroup of the group must compute. Called by all of them, once for each run.
METAL_FUNC uint visible_to_any(threadgroup Votes& votes, uint visible, int turn, ushort simdgroup, ushort index) {
  if (index == 0) votes[turn][simdgroup] = visible;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint any = 0;
  for (int i = 0; i < SIMDGROUPS; ++i) any |= votes[turn][i];
  return any;
}
#endif

// The keys of the forward pass. Under a mask a fragment has every KEY_FRAGMENTS-th key (masking.metal, key_of).
constant constexpr int KEY_STEP = KEYS_ARE_NEIGHBOURS ? KEY_FRAGMENTS : 1;

struct StagedKeys {
  StagedRows<STAGED_K_ROW, KEY_STEP> k;
  StagedRows<STAGED_V_ROW, KEY_STEP> v;
  int seqlen;
};

METAL_FUNC StagedKeys stage(threadgroup Staging<KEYS, KEY_STEP>& staging, Keys keys, int first_key, ushort thread_index) {
  stage_block(staging, keys.k, keys.v, first_key, keys.seqlen, thread_index);
  StagedKeys staged;
  staged.k.base = staging.k;
  staged.v.base = staging.v;
  staged.k.first = staged.v.first = first_key;
  staged.seqlen = keys.seqlen;
  return staged;
}
#endif
