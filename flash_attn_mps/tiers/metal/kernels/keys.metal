// The keys and values of one sequence and head in device memory: dense, packed, or in pages.

struct Rows {
  device const KV_T* base;
  long row_stride;
#if HAS_BLOCK_TABLE
  long page_stride;
  device const int* pages;  // the sequence's row of block_table
  int page_size;
  int first;  // where key 0 lies, in rows of the pages

  METAL_FUNC device const KV_T* at(int key) const thread {
    key += first;
    return base + pages[key / page_size] * page_stride + key % page_size * row_stride;
  }
#else
  METAL_FUNC device const KV_T* at(int key) const thread { return base + key * row_stride; }
#endif

  // The rows from `key` on, which becomes key 0. What is a fixed number of keys from it is, in one piece of memory, at a
  // distance that all lanes share: no address is kept, or multiplied out, for each key of a block.
  METAL_FUNC Rows from(int key) const thread {
    Rows rows = *this;
#if HAS_BLOCK_TABLE
    rows.first += key;
#else
    rows.base = at(key);
#endif
    return rows;
  }
};

struct Keys {
  Rows k;
  Rows v;
  int seqlen;
  float v_descale;  // for the output: what v is to be multiplied by
};

METAL_FUNC Keys keys_of(Sequence sequence, int head, device const KV_T* k, device const KV_T* v, Inputs in) {
  constant long* params = in.params;
  int head_k = head / int(params[HEADS_PER_KV_HEAD]);
  Keys keys;
  keys.seqlen = sequence.seqlen_k;
  keys.v_descale = KV_UNIT;
#if HAS_V_DESCALE
  keys.v_descale *= in.v_descale[sequence.batch * params[V_DESCALE_BATCH] + head_k * params[V_DESCALE_HEAD]];
#endif
  keys.k.base = k + head_k * params[K_HEAD];
  keys.v.base = v + head_k * params[V_HEAD];
  keys.k.row_stride = params[K_ROW];
  keys.v.row_stride = params[V_ROW];
  long entry = sequence.batch;
#if HAS_KV_BATCH_IDX
  entry = in.kv_batch_idx[sequence.batch];
#endif
#if HAS_BLOCK_TABLE
  keys.k.page_stride = params[K_BATCH];
  keys.v.page_stride = params[V_BATCH];
  keys.k.pages = keys.v.pages = in.block_table + entry * params[BLOCK_TABLE_ROW];
  keys.k.page_size = keys.v.page_size = int(params[PAGE_SIZE]);
  keys.k.first = keys.v.first = 0;
#if HAS_LEFTPAD_K
  keys.k.first = keys.v.first = in.leftpad_k[sequence.batch];
#endif
#else
  long first = sequence.first_k;
#if HAS_LEFTPAD_K
  first += in.leftpad_k[sequence.batch];
#endif
  keys.k.base += entry * params[K_BATCH] + first * params[K_ROW];
  keys.v.base += entry * params[V_BATCH] + first * params[V_ROW];
#endif
  return keys;
}

// The rows that a lane reads of a block of keys: `at` is the one so many keys behind its first. EDGE: there may be fewer keys
// than the block has; the last one stands for those past the end.
template <bool EDGE, typename AnyRows>
struct LaneRows {
  AnyRows rows;
  int first;
  int last;

  METAL_FUNC void begin(AnyRows all, int key, int seqlen) thread {
    rows = EDGE ? all : all.from(key);
    first = EDGE ? key : 0;
    last = seqlen - 1;
  }
  METAL_FUNC auto at(int apart) const thread { return rows.at(EDGE ? min(first + apart, last) : apart); }

  // So many elements behind in each row.
  METAL_FUNC LaneRows beside(int elements) const thread {
    LaneRows moved = *this;
    moved.rows.base += elements;
    return moved;
  }
};
