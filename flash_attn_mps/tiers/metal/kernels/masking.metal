// What a mask says of blocks of scores: where nothing is seen nothing is done, and where all is seen, or zero is added, the
// scores are left alone. A simdgroup looks at the mask of many blocks before it computes any, so that their loads are under
// way together; only what hides or changes some scores of a block is read again, with the block.
//
// A lane has two columns in each of KEY_FRAGMENTS fragments. The product p v sums over keys in any order as long as p and v
// agree on it, so under a mask fragment n takes every KEY_FRAGMENTS-th key: a lane's elements of the mask are neighbours in
// memory, 2 KEY_FRAGMENTS of them in each of its rows.

// The key that column `column + e` of fragment n stands for.
METAL_FUNC int key_of(int first, int n, int column, int e) {
#if HAS_MASK
  return first + KEY_FRAGMENTS * (column + e) + n;
#else
  return first + 8 * n + column + e;
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

// A lane's elements for a block of scores, packed.
struct Masking {
  uint words[ROW_FRAGMENTS][MASK_WORDS];

  METAL_FUNC MASK_T element(int r, int i) const thread {
    return from_bits(words[r][i * MASK_BYTES / 4] >> (8 * (i * MASK_BYTES % 4)));
  }

  // That of fragment n, column e of the lane's two.
  METAL_FUNC MASK_T at(int r, int n, int e) const thread { return element(r, KEY_FRAGMENTS * e + n); }

  METAL_FUNC void load_vectors(Scoring scoring, int first_row, int first, Lane lane) thread {
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      int row = min(first_row + 8 * r + lane.row, scoring.seqlen_q - 1);
      Words<MASK_WORDS>::load(words[r], (device const uint*)(scoring.mask_at(row, key_of(first, 0, lane.column, 0))));
    }
  }

  // Element by element, for masks in other layouts and for blocks that cross an edge: what lies beyond it is hidden.
  template <bool EDGE>
  METAL_FUNC void load_elements(Scoring scoring, int first_row, int first, int seqlen, Lane lane) thread {
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) {
      int row = first_row + 8 * r + lane.row;
      UNROLL for (int w = 0; w < MASK_WORDS; ++w) words[r][w] = 0;
      UNROLL for (int i = 0; i < MASK_ELEMENTS; ++i) {
        int key = key_of(first, i, lane.column, 0);
        MASK_T x = *scoring.mask_at(min(row, scoring.seqlen_q - 1), EDGE ? min(key, seqlen - 1) : key);
        if (EDGE && !is_seen(scoring, row, key, seqlen)) x = MASK_IS_BOOL ? MASK_T(0) : MASK_T(-INFINITY);
        words[r][i * MASK_BYTES / 4] |= bits_of(x) << (8 * (i * MASK_BYTES % 4));
      }
    }
  }

  // `edge`: some of the block's scores may not count.
  METAL_FUNC void load(bool edge, Scoring scoring, int first_row, int first, int seqlen, Lane lane) thread {
    if (edge) {
      load_elements<true>(scoring, first_row, first, seqlen, lane);
    } else if (MASK_IN_VECTORS) {
      load_vectors(scoring, first_row, first, lane);
    } else {
      load_elements<false>(scoring, first_row, first, seqlen, lane);
    }
  }

  // Is any score of the block seen, for all the simdgroup knows?
  METAL_FUNC bool some() const thread {
    bool any = false;
#if MASK_IS_BOOL
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r) UNROLL for (int w = 0; w < MASK_WORDS; ++w) any = any || words[r][w] != 0;
#else
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int i = 0; i < MASK_ELEMENTS; ++i) any = any || float(element(r, i)) != -INFINITY;
#endif
    return simd_any(any);
  }

  // Is any score other than without the mask?
  METAL_FUNC bool changed() const thread {
    bool any = false;
#if MASK_IS_BOOL
    // True is 1. If some program has it otherwise, its elements are looked at one by one.
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int w = 0; w < MASK_WORDS; ++w) any = any || words[r][w] != (MASK_ELEMENTS >= 4 ? 0x01010101u : 0x0101u);
#else
    UNROLL for (int r = 0; r < ROW_FRAGMENTS; ++r)
      UNROLL for (int i = 0; i < MASK_ELEMENTS; ++i) any = any || float(element(r, i)) != 0.0f;
#endif
    return simd_any(any);
  }
};

// Of a run of blocks a bit each, the first one's lowest: may any of its scores be seen, or be other than without the mask?
struct Outlook {
  uint some;
  uint changed;
};
constant constexpr int OUTLOOK = 32;  // blocks of a run
constant constexpr int AT_ONCE = 4;   // blocks whose loads are under way together

// The mask of a simdgroup's rows from `first_row` on, and of the run of blocks from `first` on. What hides all scores of a
// block with an edge is not found out.
METAL_FUNC Outlook outlook_of(Range range, Scoring scoring, int first_row, int first, int seqlen, Lane lane) {
  Outlook outlook;
  outlook.some = outlook.changed = 0;
  int inner_begin = (range.all_begin + KEYS - 1) / KEYS * KEYS;
  int inner_last = range.all_end / KEYS * KEYS - KEYS;
  for (int block = 0; block < OUTLOOK && first + block * KEYS < range.some_end; block += AT_ONCE) {
    Masking masking[AT_ONCE];
    int from = first + block * KEYS;
    if (inner_begin <= inner_last && from <= inner_last && from + (AT_ONCE - 1) * KEYS >= inner_begin) {
      UNROLL for (int i = 0; i < AT_ONCE; ++i)
        masking[i].load(false, scoring, first_row, clamp(from + i * KEYS, inner_begin, inner_last), seqlen, lane);
      UNROLL for (int i = 0; i < AT_ONCE; ++i) {
        outlook.some |= uint(masking[i].some()) << (block + i);
        outlook.changed |= uint(masking[i].changed()) << (block + i);
      }
    }
    UNROLL for (int i = 0; i < AT_ONCE; ++i) {
      uint bit = 1u << (block + i);
      if (!range.meets(from + i * KEYS)) {
        outlook.some &= ~bit;
      } else if (!range.holds(from + i * KEYS)) {
        outlook.some |= bit;
        outlook.changed |= bit;
      }
    }
  }
  return outlook;
}
#else
struct Masking {};
#endif
