// One launch between the projections and attention: rotary embedding of queries, and new keys (rotated) and values into the rows
// of a cache, plain or in pages, behind those that each sequence has there. Rotary embedding: RoFormer (Su et al., 2021,
// https://arxiv.org/abs/2104.09864); a pair (x0, x1) at position p becomes (x0 cos - x1 sin, x0 sin + x1 cos), in float32.
//
// A thread has 2 PAIRS elements of one row of one head. The heads of q, k and v follow each other along y. BUFFERS, INPUTS and
// the names in params[...] are declared by the host: rotary.py.

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int PIECES = (MAX_DIM + 2 * PAIRS - 1) / (2 * PAIRS);  // of a row, one for each thread
constant constexpr int ROTATED_PIECES = ROTARY_DIM / (2 * PAIRS);

// N neighbours, in one access.
template <typename E, int N>
struct Neighbours {
  METAL_FUNC static void load(thread float* to, device const E* from) {
    vec<E, N> x = *(device const vec<E, N>*)from;
    UNROLL for (int i = 0; i < N; ++i) to[i] = float(x[i]);
  }
  METAL_FUNC static void store(device E* to, thread const E* from) {
    vec<E, N> x;
    UNROLL for (int i = 0; i < N; ++i) x[i] = from[i];
    *(device vec<E, N>*)to = x;
  }
};
template <typename E>
struct Neighbours<E, 1> {
  METAL_FUNC static void load(thread float* to, device const E* from) { to[0] = float(from[0]); }
  METAL_FUNC static void store(device E* to, thread const E* from) { to[0] = from[0]; }
};

// Elements of a row: PAIRS neighbours from `first` on and as many from `second` on, which may lie beyond the row of DIM elements.
// PAIRS divides DIM.
template <int DIM>
struct Piece {
  int first;
  int second;
  float x[PAIRS];
  float y[PAIRS];

  METAL_FUNC bool exists() const thread { return first < DIM; }

  METAL_FUNC void load(device const T* row) thread {
    Neighbours<T, PAIRS>::load(x, row + first);
    if (second < DIM) Neighbours<T, PAIRS>::load(y, row + second);
  }

  METAL_FUNC void store(device T* row) const thread {
    T of_x[PAIRS], of_y[PAIRS];
    UNROLL for (int i = 0; i < PAIRS; ++i) of_x[i] = T(x[i]), of_y[i] = T(y[i]);
    Neighbours<T, PAIRS>::store(row + first, of_x);
    if (second < DIM) Neighbours<T, PAIRS>::store(row + second, of_y);
  }

#if KV_FORMAT
  // What is encoded was rounded to T first: the codes are those of what a cache of T would hold.
  METAL_FUNC void store_codes(device uchar* row, float descale) const thread {
    uchar of_x[PAIRS], of_y[PAIRS];
    UNROLL for (int i = 0; i < PAIRS; ++i) {
      of_x[i] = encoded(precise::divide(float(T(x[i])), descale));
      of_y[i] = encoded(precise::divide(float(T(y[i])), descale));
    }
    Neighbours<uchar, PAIRS>::store(row + first, of_x);
    if (second < DIM) Neighbours<uchar, PAIRS>::store(row + second, of_y);
  }
#endif
};

// The `index`th piece of a row that is not rotated; all of it lies together.
template <int DIM>
METAL_FUNC Piece<DIM> piece_of(int index) {
  Piece<DIM> piece;
  piece.first = 2 * PAIRS * index;
  piece.second = piece.first + PAIRS;
  return piece;
}

// And of one that is: pairs, that lie together where they are interleaved, or one in each half of ROTARY_DIM.
template <int DIM>
METAL_FUNC Piece<DIM> pairs_of(int index) {
  Piece<DIM> piece = piece_of<DIM>(index);
#if !INTERLEAVED
  if (index < ROTATED_PIECES) {
    piece.first = PAIRS * index;
    piece.second = piece.first + ROTARY_DIM / 2;
  }
#endif
  return piece;
}

// Which sequence a row belongs to, -1 for none, and which row of it it is.
struct Place {
  int sequence;
  int row;
};

METAL_FUNC Place place_of(uint row, uint seqlen) {
  Place place;
  place.sequence = int(row / seqlen);
  place.row = int(row % seqlen);
  return place;
}

template <typename Index>
METAL_FUNC Place place_of(uint row, device const Index* cu_seqlens, int batch) {
  int low = 0, high = batch;  // the sequence of the first end beyond the row
  while (low < high) {
    int middle = (low + high) / 2;
    if (long(cu_seqlens[middle + 1]) > long(row)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  Place place;
  place.sequence = low < batch ? low : -1;
  place.row = low < batch ? int(long(row) - long(cu_seqlens[low])) : 0;
  return place;
}

#if ROTARY_DIM
// Rotates the `index`th piece of a row at `position`, unless the tables have no such row.
template <int DIM>
METAL_FUNC void rotate(thread Piece<DIM>& piece, int index, long position, Inputs in) {
  constant long* params = in.params;
  if (index >= ROTATED_PIECES || position < 0 || position >= params[POSITIONS]) return;
  float c[PAIRS], s[PAIRS];
  Neighbours<TABLE_T, PAIRS>::load(c, in.cosines + position * params[COSINES_ROW] + index * PAIRS);
  Neighbours<TABLE_T, PAIRS>::load(s, in.sines + position * params[SINES_ROW] + index * PAIRS);
  float sign = float(params[SIGN]);
#if INTERLEAVED
  float x[2 * PAIRS];
  UNROLL for (int i = 0; i < PAIRS; ++i) x[i] = piece.x[i], x[PAIRS + i] = piece.y[i];
  UNROLL for (int i = 0; i < PAIRS; ++i) {
    float x0 = x[2 * i], x1 = x[2 * i + 1], sine = sign * s[i];
    x[2 * i] = fma(x0, c[i], -(x1 * sine));
    x[2 * i + 1] = fma(x0, sine, x1 * c[i]);
  }
  UNROLL for (int i = 0; i < PAIRS; ++i) piece.x[i] = x[i], piece.y[i] = x[PAIRS + i];
#else
  UNROLL for (int i = 0; i < PAIRS; ++i) {
    float x0 = piece.x[i], x1 = piece.y[i], sine = sign * s[i];
    piece.x[i] = fma(x0, c[i], -(x1 * sine));
    piece.y[i] = fma(x0, sine, x1 * c[i]);
  }
#endif
}

// The position of the first query and of the first new key of a sequence.
METAL_FUNC long start_of(int sequence, Inputs in) {
#if HAS_START
  return in.start[sequence];
#else
  return in.params[START];
#endif
}
#endif

#if HAS_Q
METAL_FUNC void rotate_query(int index, uint row, int head, device const T* q, device T* rotated_q, Inputs in) {
  constant long* params = in.params;
  Piece<HEAD_DIM> piece = pairs_of<HEAD_DIM>(index);
  if (row >= uint(params[ROWS_Q]) || !piece.exists()) return;
#if HAS_CU_SEQLENS_Q
  Place place = place_of(row, in.cu_seqlens_q, int(params[BATCH]));
  long batch = 0, row_of_batch = row;
#else
  Place place = place_of(row, uint(params[SEQLEN_Q]));
  long batch = place.sequence, row_of_batch = place.row;
#endif
  piece.load(q + batch * params[Q_BATCH] + row_of_batch * params[Q_ROW] + head * params[Q_HEAD]);
  if (place.sequence >= 0) rotate(piece, index, start_of(place.sequence, in) + place.row * params[ADVANCE], in);
  piece.store(rotated_q + batch * params[ROTATED_Q_BATCH] + row_of_batch * params[ROTATED_Q_ROW] + head * params[ROTATED_Q_HEAD]);
}
#endif

#if HAS_K
// How many rows a sequence has in the cache, before the new ones.
METAL_FUNC long cached_of(int sequence, Inputs in) {
#if HAS_CACHED
  return in.cached[sequence];
#else
  return in.params[CACHED];
#endif
}

// The entry of the cache, or the page, in which a row of a sequence is, and its row there. Entry -1: there is no place for it.
struct CacheRow {
  long entry;
  long row;
};

METAL_FUNC CacheRow cache_row_of(int sequence, long row, Inputs in) {
  constant long* params = in.params;
  CacheRow at;
  at.entry = sequence;
  at.row = row;
#if HAS_KV_BATCH_IDX
  at.entry = in.kv_batch_idx[sequence];
#endif
  bool is_there = row >= 0 && row < params[ROOM];
#if HAS_BLOCK_TABLE
  is_there = is_there && at.entry >= 0 && at.entry < params[BLOCK_TABLE_ROWS];
  if (is_there) at.entry = in.block_table[at.entry * params[BLOCK_TABLE_ROW] + row / params[PAGE_SIZE]];
  at.row = row % params[PAGE_SIZE];
#endif
  if (!is_there || at.entry >= params[ENTRIES]) at.entry = -1;
  return at;
}

// A row of a sequence, dense or packed, and its place in the cache.
struct NewRow {
  Place place;
  CacheRow to;
  long batch;
  long row;
};

METAL_FUNC NewRow new_row_of(uint row, Inputs in) {
  constant long* params = in.params;
  NewRow found;
#if HAS_CU_SEQLENS_K_NEW
  found.place = place_of(row, in.cu_seqlens_k_new, int(params[BATCH]));
  found.batch = 0;
  found.row = row;
#else
  found.place = place_of(row, uint(params[SEQLEN_NEW]));
  found.batch = found.place.sequence;
  found.row = found.place.row;
#endif
  found.to.entry = -1;
  if (found.place.sequence >= 0)
    found.to = cache_row_of(found.place.sequence, cached_of(found.place.sequence, in) + found.place.row, in);
  return found;
}

METAL_FUNC void append_key(int index, uint row, int head, device const T* k, device KV_T* k_cache, Inputs in) {
  constant long* params = in.params;
#if ROTARY_DIM
  Piece<HEAD_DIM> piece = pairs_of<HEAD_DIM>(index);
#else
  Piece<HEAD_DIM> piece = piece_of<HEAD_DIM>(index);
#endif
  if (row >= uint(params[ROWS_NEW]) || !piece.exists()) return;
  NewRow from = new_row_of(row, in);
  if (from.to.entry < 0) return;
  piece.load(k + from.batch * params[K_BATCH] + from.row * params[K_ROW] + head * params[K_HEAD]);
#if ROTARY_DIM
  rotate(piece, index, start_of(from.place.sequence, in) + from.place.row, in);
#endif
  device KV_T* to = k_cache + from.to.entry * params[K_CACHE_BATCH] + from.to.row * params[K_CACHE_ROW] + head * params[K_CACHE_HEAD];
#if HAS_K_DESCALE
  piece.store_codes(to, in.k_descale[from.place.sequence * params[K_DESCALE_BATCH] + head * params[K_DESCALE_HEAD]]);
#elif KV_FORMAT
  piece.store_codes(to, 1.0f);
#else
  piece.store(to);
#endif
}

METAL_FUNC void append_value(int index, uint row, int head, device const T* v, device KV_T* v_cache, Inputs in) {
  constant long* params = in.params;
  Piece<HEAD_DIM_V> piece = piece_of<HEAD_DIM_V>(index);
  if (row >= uint(params[ROWS_NEW]) || !piece.exists()) return;
  NewRow from = new_row_of(row, in);
  if (from.to.entry < 0) return;
  piece.load(v + from.batch * params[V_BATCH] + from.row * params[V_ROW] + head * params[V_HEAD]);
  device KV_T* to = v_cache + from.to.entry * params[V_CACHE_BATCH] + from.to.row * params[V_CACHE_ROW] + head * params[V_CACHE_HEAD];
#if HAS_V_DESCALE
  piece.store_codes(to, in.v_descale[from.place.sequence * params[V_DESCALE_BATCH] + head * params[V_DESCALE_HEAD]]);
#elif KV_FORMAT
  piece.store_codes(to, 1.0f);
#else
  piece.store(to);
#endif
}

#if HAS_SEQUSED_K
// How many keys a sequence has with the new ones.
METAL_FUNC void count_keys(uint sequence, device int* seqused_k, Inputs in) {
  constant long* params = in.params;
  if (sequence >= uint(params[BATCH])) return;
  long seqlen = cached_of(int(sequence), in);
#if HAS_CU_SEQLENS_K_NEW
  seqlen += in.cu_seqlens_k_new[sequence + 1] - in.cu_seqlens_k_new[sequence];
#else
  seqlen += params[SEQLEN_NEW];
#endif
#if HAS_LEFTPAD_K
  seqlen -= in.leftpad_k[sequence];
#endif
  seqused_k[sequence] = int(seqlen);
}
#endif
#endif

[[max_total_threads_per_threadgroup(256)]]
kernel void rotate_and_append(BUFFERS uint2 thread_index [[thread_position_in_grid]]) {
  Inputs in = INPUTS;
  int index = int(thread_index.x % PIECES), head = int(thread_index.y);
  uint row = thread_index.x / PIECES;
#if HAS_Q
  int heads_q = int(params[HEADS_Q]);
  if (head < heads_q) return rotate_query(index, row, head, q, rotated_q, in);
  head -= heads_q;
#endif
#if HAS_K
  int heads_k = int(params[HEADS_K]);
  if (head < heads_k) return append_key(index, row, head, k, k_cache, in);
  if (head < 2 * heads_k) return append_value(index, row, head - heads_k, v, v_cache, in);
#if HAS_SEQUSED_K
  count_keys(thread_index.x, seqused_k, in);
#endif
#endif
}
