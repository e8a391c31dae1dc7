// How the rows and columns of a tile are dealt to the lanes of a simdgroup, the same for all fragments (fragment.metal,
// cooperative.metal): a lane has one row in eight, and a quarter of that row's columns, which four lanes share.

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int ROW_FRAGMENTS = ROWS / 8;
constant constexpr int KEY_FRAGMENTS = KEYS / 8;

struct Lane {
  short row;     // 0 to 7
  short column;  // 0, 2, 4 or 6: twice the number of its quarter of a row
  ushort index;  // in the simdgroup
};

METAL_FUNC Lane lane_of(ushort index) {
  Lane lane;
  lane.row = short((index >> 2 & 4) | (index >> 1 & 3));
  lane.column = short((index >> 1 & 4) | (index & 1) << 1);
  lane.index = index;
  return lane;
}

// The four lanes that share a row.
METAL_FUNC float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// What a lane keeps of which scores of a row are visible: bit 2 n + e for element e of fragment n.
METAL_FUNC bool is_seen(ushort visible, int n, int e) {
  return visible >> (2 * n + e) & 1;
}
