// Which keys a tile of queries sees: causal, window and the sequence's length, but not the mask.
struct KeyRange {
  int visible_begin;  // keys that some of the queries see,
  int visible_end;
  int full_begin;     // and those that all of them see
  int full_end;

  // Of the block of KEYS keys from `first_key` on: may any be seen, are all seen by all?
  METAL_FUNC bool overlaps(int first_key) const thread { return first_key + KEYS > visible_begin && first_key < visible_end; }
  METAL_FUNC bool contains(int first_key) const thread { return first_key >= full_begin && first_key + KEYS <= full_end; }
};

METAL_FUNC KeyRange key_range_of(Scoring scoring, int first_row, int last_row, int seqlen_k) {
  KeyRange range;
  range.visible_begin = range.full_begin = 0;
  range.visible_end = range.full_end = seqlen_k;
#if HAS_WINDOW_RIGHT
  range.visible_end = min(seqlen_k, last_row + scoring.offset + scoring.right + 1);
  range.full_end = min(seqlen_k, first_row + scoring.offset + scoring.right + 1);
#endif
#if HAS_WINDOW_LEFT
  range.visible_begin = max(0, first_row + scoring.offset - scoring.left);
  range.full_begin = max(0, last_row + scoring.offset - scoring.left);
#endif
#if HAS_MASK || HAS_DROPOUT
  range.visible_begin -= range.visible_begin % KEYS;  // where the mask's rows have whole vectors, and dropout whole eights
#endif
  return range;
}
