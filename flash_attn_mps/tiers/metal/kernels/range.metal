// The keys that some of a range of queries see, and those that all of them see.
struct Range {
  int some_begin;
  int some_end;
  int all_begin;
  int all_end;

  METAL_FUNC bool meets(int first) const thread { return first + KEYS > some_begin && first < some_end; }
  METAL_FUNC bool holds(int first) const thread { return first >= all_begin && first + KEYS <= all_end; }
};

METAL_FUNC Range range_of(Scoring scoring, int first_row, int last_row, int seqlen_k) {
  Range range;
  range.some_begin = range.all_begin = 0;
  range.some_end = range.all_end = seqlen_k;
#if HAS_WINDOW_RIGHT
  range.some_end = min(seqlen_k, last_row + scoring.offset + scoring.right + 1);
  range.all_end = min(seqlen_k, first_row + scoring.offset + scoring.right + 1);
#endif
#if HAS_WINDOW_LEFT
  range.some_begin = max(0, first_row + scoring.offset - scoring.left);
  range.all_begin = max(0, last_row + scoring.offset - scoring.left);
#endif
#if HAS_MASK
  range.some_begin -= range.some_begin % KEYS;  // where vectors of the mask begin
#endif
  return range;
}
