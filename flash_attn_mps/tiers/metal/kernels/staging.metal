// A block of k and v in threadgroup memory, for GPUs whose first-level cache is too small to share rows between simdgroups.

#if STAGED
// Elements from one row to the next: 16 bytes more than the row has, to keep neighbouring rows off the same bank.
constant constexpr int STAGED_K_ROW = (HEAD_DIM + 7) / 8 * 8 + 16 / ELEMENT_BYTES;
constant constexpr int STAGED_V_ROW = (HEAD_DIM_V + 7) / 8 * 8 + 16 / ELEMENT_BYTES;

// The row of threadgroup memory that holds a key of the block. The keys of a fragment are read together: neighbouring rows keep
// them off the same bank, and under a mask a fragment has every KEY_FRAGMENTS-th key (masking.metal, key_of).
METAL_FUNC int slot_of(uint key) {
#if HAS_MASK
  return key % KEY_FRAGMENTS * 8 + key / KEY_FRAGMENTS;
#else
  return key;
#endif
}

template <int STAGED_ROW>
struct StagedRows {
  threadgroup const T* base;
  int first_key;  // the key that they begin with

  METAL_FUNC threadgroup const T* at(int key) const thread { return base + slot_of(key - first_key) * STAGED_ROW; }
};

struct StagedKeys {
  StagedRows<STAGED_K_ROW> k;
  StagedRows<STAGED_V_ROW> v;
  int seqlen;
};

struct Staging {
  alignas(16) T k[KEYS * STAGED_K_ROW];
  alignas(16) T v[KEYS * STAGED_V_ROW];
#if HAS_MASK
  uint visible[2][SIMDGROUPS];  // BlockFlags.visible of each simdgroup, for two runs by turns, so that one barrier is enough
#endif
};

#if HAS_MASK
// The blocks of a run, a bit each, that any simdgroup of the group must compute. Called by all of them, once for each run.
METAL_FUNC uint visible_to_any(threadgroup Staging& staging, uint visible, int turn, ushort simdgroup, ushort index) {
  if (index == 0) staging.visible[turn][simdgroup] = visible;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint any = 0;
  for (int i = 0; i < SIMDGROUPS; ++i) any |= staging.visible[turn][i];
  return any;
}
#endif

inline constexpr int copy_width(int dim, int aligned) {
  return dim % 8 == 0 && aligned >= 8 ? 8 : dim % 4 == 0 && aligned >= 4 ? 4 : dim % 2 == 0 && aligned >= 2 ? 2 : 1;
}

// KEYS rows of DIM elements, from `first_key` on, by all threads of the group; the last row stands for those past the end.
template <int DIM, int ALIGNED, int STAGED_ROW>
METAL_FUNC void copy_rows(threadgroup T* to, Rows from, int first_key, int seqlen, ushort thread_index) {
  constexpr int W = copy_width(DIM, ALIGNED);
  constexpr int PIECES = DIM / W;
  for (int i = thread_index; i < KEYS * PIECES; i += 32 * SIMDGROUPS) {
    int row = i / PIECES, piece = i % PIECES;
    T x[W];
    Elements<W>::load(x, from.at(min(first_key + row, seqlen - 1)) + piece * W);
    Elements<W>::store(to + slot_of(row) * STAGED_ROW + piece * W, x);
  }
}

METAL_FUNC StagedKeys stage(threadgroup Staging& staging, Keys keys, int first_key, ushort thread_index) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // until all have read the block before
  copy_rows<HEAD_DIM, VECTOR, STAGED_K_ROW>(staging.k, keys.k, first_key, keys.seqlen, thread_index);
  copy_rows<HEAD_DIM_V, VECTOR_V, STAGED_V_ROW>(staging.v, keys.v, first_key, keys.seqlen, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  StagedKeys staged;
  staged.k.base = staging.k;
  staged.k.first_key = first_key;
  staged.v.base = staging.v;
  staged.v.first_key = first_key;
  staged.seqlen = keys.seqlen;
  return staged;
}
#endif
