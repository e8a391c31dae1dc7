// What dropout keeps of a block of scores, in a simdgroup's registers: a byte for a query and eight keys, a bit a key. A call of
// the generator gives one byte. Each is made by one lane, 32 at a time, and fetched from it by whoever needs one of its bits.

#if HAS_DROPOUT
// The bytes of QUERIES queries (8, 16 or 32) and EIGHTS eights of keys: number i is that of query i % QUERIES and eight
// i / QUERIES.
template <int QUERIES, int EIGHTS>
struct KeptBlock {
  enum { BYTES = QUERIES * EIGHTS, CALLS = (BYTES + 31) / 32, WORDS = (CALLS + 3) / 4 };
  uint words[WORDS];  // byte i is made by lane i % 32: its byte i / 32

  // The queries from `first_row` on and the keys from `first_key` on, a multiple of 8.
  METAL_FUNC void make(Dropout dropout, int first_row, int first_key, Lane lane) thread {
    UNROLL for (int w = 0; w < WORDS; ++w) words[w] = 0;
    UNROLL for (int call = 0; call < CALLS; ++call) {
      uint i = (32 * call + lane.index) % BYTES;
      uint byte = dropout.kept_of_eight(first_row + int(i % QUERIES), first_key / 8 + int(i / QUERIES));
      words[call / 4] |= byte << (8 * (call % 4));
    }
  }

  // That of a query and an eight of the block in the low bits, and anything above them. Called by the whole simdgroup; its
  // lanes may ask for different ones.
  METAL_FUNC uint byte(int query, int eight) const thread {
    uint i = query + QUERIES * eight;
    uint word = simd_shuffle(words[0], ushort(i % 32));
    UNROLL for (int w = 1; w < WORDS; ++w) {
      uint other = simd_shuffle(words[w], ushort(i % 32));
      word = i / 128 == uint(w) ? other : word;
    }
    return word >> (8 * (i / 32 % 4));
  }
};
#endif
