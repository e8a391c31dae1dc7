// How the keys that a tile of queries sees are divided between threadgroups, for decode.metal and combine.metal.

constant constexpr int ROUND = UNITS * KEYS;  // keys of a round, in which each unit of a threadgroup has one block

// A part has whole rounds, so that there may be fewer parts than `splits`: the last threadgroups have none.
METAL_FUNC int keys_of_part(VisibleRange range, int splits) {
  int keys = max(range.visible_end - range.visible_begin, 0);
  return (keys + splits * ROUND - 1) / (splits * ROUND) * ROUND;
}

METAL_FUNC int parts_of(VisibleRange range, int splits) {
  int keys = keys_of_part(range, splits);
  return keys == 0 ? 0 : (range.visible_end - range.visible_begin + keys - 1) / keys;
}

// What of `range` is the part of that split.
METAL_FUNC VisibleRange part_of(VisibleRange range, int splits, int split) {
  int keys = keys_of_part(range, splits);
  VisibleRange part = range;
  part.visible_begin = range.visible_begin + split * keys;
  part.visible_end = min(part.visible_begin + keys, range.visible_end);
  return part;
}

// The keys that the queries of a tile see, of which `rows` belong to its sequence.
METAL_FUNC VisibleRange key_range_of_rows(Scoring scoring, int first_row, int rows, int seqlen_k) {
  int last_row = min(first_row + ROWS, rows) - 1;
  return key_range_of(scoring, query_of(first_row), query_of(last_row), seqlen_k);
}

// Rows of partial results: one for each head of each query, in the order of the output.
constant constexpr int PARTIAL_WIDTH = (HEAD_DIM_V + 7) / 8 * 8;

METAL_FUNC long partial_row_of(Sequence sequence, int query, int head, int heads, Inputs in) {
#if HAS_CU_SEQLENS_Q
  long first = sequence.first_q;
#else
  long first = long(sequence.batch) * in.params[SEQLEN_Q];
#endif
  return (first + query) * heads + head;
}
