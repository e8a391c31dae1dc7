// The keys and values of one sequence and head in device memory: dense, packed, or in pages.

struct Rows {
  device const T* rows;
  long row;     // stride
#if PAGED
  long page;    // stride
  device const int* pages;
  int page_size;
#if HAS_LEFTPAD_K
  int leftpad;
#endif

  METAL_FUNC device const T* at(int key) const thread {
#if HAS_LEFTPAD_K
    key += leftpad;
#endif
    return rows + pages[key / page_size] * page + key % page_size * row;
  }
#else
  METAL_FUNC device const T* at(int key) const thread { return rows + key * row; }
#endif
};

struct Keys {
  Rows k;
  Rows v;
  int seqlen;
};

METAL_FUNC Keys keys_of(Sequence sequence, int head, device const T* k, device const T* v, Inputs in) {
  constant long* p = in.p;
  int head_k = head / int(p[GROUP]);
  Keys keys;
  keys.seqlen = sequence.seqlen_k;
  keys.k.rows = k + head_k * p[K_HEAD];
  keys.v.rows = v + head_k * p[V_HEAD];
  keys.k.row = p[K_ROW];
  keys.v.row = p[V_ROW];
#if PAGED
  keys.k.page = p[K_BATCH];
  keys.v.page = p[V_BATCH];
  keys.k.pages = keys.v.pages = in.block_table + sequence.batch * p[TABLE_ROW];
  keys.k.page_size = keys.v.page_size = int(p[PAGE_SIZE]);
#if HAS_LEFTPAD_K
  keys.k.leftpad = keys.v.leftpad = in.leftpad_k[sequence.batch];
#endif
#else
  long entry = sequence.batch;
#if HAS_KV_BATCH_IDX
  entry = in.kv_batch_idx[sequence.batch];
#endif
  long first = sequence.first_k;
#if HAS_LEFTPAD_K
  first += in.leftpad_k[sequence.batch];
#endif
  keys.k.rows += entry * p[K_BATCH] + first * p[K_ROW];
  keys.v.rows += entry * p[V_BATCH] + first * p[V_ROW];
#endif
  return keys;
}
