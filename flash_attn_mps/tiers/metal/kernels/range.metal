// Which keys some queries see, and which queries some keys are seen by: causal, window and the sequence's length, but not the
// mask.

struct VisibleRange {
  int visible_begin;  // of the rows of one side those that some of the other side go with,
  int visible_end;
  int full_begin;     // and those that all of them go with
  int full_end;

  // Of the `count` rows from `first` on: may any be seen, are all seen by all?
  METAL_FUNC bool overlaps(int first, int count) const thread { return first + count > visible_begin && first < visible_end; }
  METAL_FUNC bool contains(int first, int count) const thread { return first >= full_begin && first + count <= full_end; }
};

METAL_FUNC VisibleRange key_range_of(Scoring scoring, int first_row, int last_row, int seqlen_k) {
  VisibleRange range;
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

// With the sides exchanged: query i sees key j iff j - offset - right <= i <= j - offset + left.
METAL_FUNC VisibleRange query_range_of(Scoring scoring, int first_key, int last_key, int seqlen_q) {
  VisibleRange range;
  range.visible_begin = range.full_begin = 0;
  range.visible_end = range.full_end = seqlen_q;
#if HAS_WINDOW_RIGHT
  range.visible_begin = max(0, first_key - scoring.offset - scoring.right);
  range.full_begin = max(0, last_key - scoring.offset - scoring.right);
#endif
#if HAS_WINDOW_LEFT
  range.visible_end = min(seqlen_q, last_key - scoring.offset + scoring.left + 1);
  range.full_end = min(seqlen_q, first_key - scoring.offset + scoring.left + 1);
#endif
#if HAS_MASK
  range.visible_begin -= range.visible_begin % ROWS;
#endif
  return range;
}
