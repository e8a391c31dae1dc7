// Masks, bool (MASK_IS_BOOL: false hides) or added (MASK_IS_ADDED: -inf hides). A block of scores that the mask hides whole is
// skipped, and one whose scores it leaves as they are is computed as if there were no mask. To know which, a simdgroup looks at
// the mask of many blocks before it computes any, so that their loads are under way together. Only the mask of a block that it
// hides in part, or changes, is loaded again with the block.
//
// A lane has two columns in each of KEY_FRAGMENTS fragments. The product p v sums over keys in any order as long as p and v
// agree on it, so under a mask fragment n takes every KEY_FRAGMENTS-th key: a lane's elements of the mask are neighbours in
// memory, 2 KEY_FRAGMENTS of them in each of its rows.

// The key that column `column + e` of fragment n stands for.
METAL_FUNC int key_of(int first_key, int n, int column, int e) {
#if KEYS_ARE_NEIGHBOURS
  return first_key + KEY_FRAGMENTS * (column + e) + n;
#else
  return first_key + 8 * n + column + e;
#endif
}

#if HAS_MASK
constant constexpr int MASK_BYTES = int(sizeof(MASK_T));
constant constexpr int MASK_ELEMENTS = 2 * KEY_FRAGMENTS;  // of a lane in a row
constant constexpr int MASK_WORDS = (MASK_ELEMENTS * MASK_BYTES + 3) / 4;
constant constexpr bool MASK_IN_VECTORS = MASK_ALIGNED >= 4 && MASK_ELEMENTS * MASK_BYTES >= 4;

#if MASK_IS_BOOL
METAL_FUNC uint bits_of(MASK_T x) { return x ? 1 : 0; }
METAL_FUNC MASK_T from_bits(uint bits) { return MASK_T(bits & 255); }
#elif MASK_T_BYTES == 2
METAL_FUNC uint bits_of(MASK_T x) { return as_type<ushort>(x); }
METAL_FUNC MASK_T from_bits(uint bits) { return as_type<MASK_T>(ushort(bits & 65535)); }
#else
METAL_FUNC uint bits_of(MASK_T x) { return as_type<uint>(x); }
METAL_FUNC MASK_T from_bits(uint bits) { return as_type<MASK_T>(bits); }
#endif

// N neighbouring words, in as few accesses as their alignment allows.
template <int N>
struct Words {
  METAL_FUNC static void load(thread uint* to, device const uint* from) {
    Words<N / 2>::load(to, from);
    Words<N / 2>::load(to + N / 2, from + N / 2);
  }
};
template <>
struct Words<1> {
  METAL_FUNC static void load(thread uint* to, device const uint* from) { to[0] = from[0]; }
};
#if MASK_ALIGNED >= 16
template <>
struct Words<2> {
  METAL_FUNC static void load(thread uint* to, device const uint* from) {
    uint2 x = *(device const uint2*)from;
    to[0] = x.x, to[1] = x.y;
  }
};
template <>
struct Words<4> {
  METAL_FUNC static void load(thread uint* to, device const uint* from) {
    uint4 x = *(device const uint4*)from;
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }
};
#endif

// A lane's elements of the mask for one block of scores, packed in words.
struct MaskTile {
  uint words[ROW_FRAGMENTS][MASK_WORDS];

  METAL_FUNC MASK_T element(int r, int i) const thread {
    return from_bits(words[r][i * MASK_BYTES / 4] >> (8 * (i * MASK_BYTES % 4)));
  }

  // The element for row fragment r, key fragment n and column e of the lane's two.
  METAL_FUNC MASK_T at(int r, int n, int e) const thread { return element(r, KEY_FRAGMENTS * e + n); }

  METAL_FUNC void load_vectors(Scoring scoring, int first_row, int first_key, Lane lane) thread {
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      int row = min(first_row + 8 * r + lane.row, scoring.seqlen_q * HEADS_IN_TILE - 1);
      Words<MASK_WORDS>::load(words[r], (device const uint*)(scoring.mask_at(row, key_of(first_key, 0, lane.column, 0))));
    }
  }

  // Element by element, for masks in other layouts and for blocks that cross an edge, beyond which every key is hidden.
  template <bool EDGE>
  METAL_FUNC void load_elements(Scoring scoring, int first_row, int first_key, int seqlen, Lane lane) thread {
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      int row = first_row + 8 * r + lane.row;
      UNROLL for (int w = 0; w < MASK_WORDS; ++w) words[r][w] = 0;
      UNROLL for (int i = 0; i < MASK_ELEMENTS; ++i) {
        int key = key_of(first_key, i, lane.column, 0);
        int last_row = scoring.seqlen_q * HEADS_IN_TILE - 1;
        MASK_T x = *scoring.mask_at(min(row, last_row), EDGE ? min(key, seqlen - 1) : key);
        if (EDGE && !is_visible(scoring, query_of(row), key, seqlen)) x = MASK_IS_BOOL ? MASK_T(0) : MASK_T(-INFINITY);
        words[r][i * MASK_BYTES / 4] |= bits_of(x) << (8 * (i * MASK_BYTES % 4));
      }
    }
  }

  // `edge`: the sequence's end or a side of the window may lie in the block.
  METAL_FUNC void load(bool edge, Scoring scoring, int first_row, int first_key, int seqlen, Lane lane) thread {
    if (edge) {
      load_elements<true>(scoring, first_row, first_key, seqlen, lane);
    } else if (MASK_IN_VECTORS) {
      load_vectors(scoring, first_row, first_key, lane);
    } else {
      load_elements<false>(scoring, first_row, first_key, seqlen, lane);
    }
  }

  // Does any of the simdgroup's queries see any key of the block?
  METAL_FUNC bool any_visible() const thread {
    bool any = false;
#if MASK_IS_BOOL
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) UNROLL for (int w = 0; w < MASK_WORDS; ++w) any = any || words[r][w] != 0;
#else
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int i = 0; i < MASK_ELEMENTS; ++i) any = any || float(element(r, i)) != -INFINITY;
#endif
    return simd_any(any);
  }

  // Does the mask hide, or add something other than zero to, any score of the block?
  METAL_FUNC bool alters_scores() const thread {
    bool any = false;
#if MASK_IS_BOOL
    // torch stores true as 1. Where a program has another byte for it, this says yes and `apply_mask` sees to it.
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int w = 0; w < MASK_WORDS; ++w) any = any || words[r][w] != (MASK_ELEMENTS >= 4 ? 0x01010101u : 0x0101u);
#else
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int i = 0; i < MASK_ELEMENTS; ++i) any = any || float(element(r, i)) != 0.0f;
#endif
    return simd_any(any);
  }
};

// Bit b is that of block b of a run.
struct BlockFlags {
  uint visible;  // some query may see some key of the block: it must be computed
  uint altered;  // the mask hides or changes some of its scores: it must be applied
};
constant constexpr int BLOCKS_PER_RUN = 32;   // as many as BlockFlags has bits
constant constexpr int TILE_WORDS = ROW_FRAGMENTS * MASK_WORDS;
constant constexpr int BLOCKS_IN_FLIGHT = TILE_WORDS <= 4 ? 4 : TILE_WORDS <= 8 ? 2 : 1;  // whose masks are loaded together

// What the mask says of a run of blocks of ROWS queries and KEYS keys: of those of the queries from `first_row` on, whose keys
// lie in `range`, each `step` keys after the one before, from `first_key` on; or, ALONG_QUERIES, with the sides exchanged. A block
// with an edge on the side of the run counts as visible and altered, unread.
template <bool ALONG_QUERIES>
METAL_FUNC BlockFlags scan_mask(
    VisibleRange range, Scoring scoring, int first_row, int first_key, int step, int seqlen, Lane lane) {
  constexpr int BLOCK = ALONG_QUERIES ? ROWS : KEYS;
  int first = ALONG_QUERIES ? first_row : first_key;
  BlockFlags flags;
  flags.visible = flags.altered = 0;
  int inner_begin = (range.full_begin + BLOCK - 1) / BLOCK * BLOCK;
  int inner_last = range.full_end / BLOCK * BLOCK - BLOCK;
  for (int block = 0; block < BLOCKS_PER_RUN && first + block * step < range.visible_end; block += BLOCKS_IN_FLIGHT) {
    MaskTile mask_tile[BLOCKS_IN_FLIGHT];
    int from = first + block * step;
    if (inner_begin <= inner_last && from <= inner_last && from + (BLOCKS_IN_FLIGHT - 1) * step >= inner_begin) {
      UNROLL for (int i = 0; i < BLOCKS_IN_FLIGHT; ++i) {
        int at = clamp(from + i * step, inner_begin, inner_last);
        mask_tile[i].load(false, scoring, ALONG_QUERIES ? at : first_row, ALONG_QUERIES ? first_key : at, seqlen, lane);
      }
      UNROLL for (int i = 0; i < BLOCKS_IN_FLIGHT; ++i) {
        flags.visible |= uint(mask_tile[i].any_visible()) << (block + i);
        flags.altered |= uint(mask_tile[i].alters_scores()) << (block + i);
      }
    }
    UNROLL for (int i = 0; i < BLOCKS_IN_FLIGHT; ++i) {
      uint bit = 1u << (block + i);
      if (!range.overlaps(from + i * step, BLOCK)) {
        flags.visible &= ~bit;
      } else if (!range.contains(from + i * step, BLOCK)) {
        flags.visible |= bit;
        flags.altered |= bit;
      }
    }
  }
  return flags;
}
#else
struct MaskTile {};
#endif
