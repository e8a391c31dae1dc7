// What dropout keeps of the scores that a simdgroup of forward.metal computes; all of them where there is no dropout.

#if HAS_DROPOUT
// Eights of keys whose random bits are made together: those of a block, or of as many as give every lane a byte to make.
constant constexpr int KEPT_EIGHTS = KEY_FRAGMENTS * ROWS >= 32 ? KEY_FRAGMENTS : 32 / ROWS;
constant constexpr int KEPT_ROW_BYTES = !KEYS_ARE_NEIGHBOURS ? KEY_FRAGMENTS : KEY_FRAGMENTS < 4 ? 1 : KEY_FRAGMENTS / 4;

// Of a lane's keys in one of its rows: a bit for each of KEY_FRAGMENTS fragments and two elements.
struct KeptRow {
  uint bytes[KEPT_ROW_BYTES];

  METAL_FUNC bool at(int n, int e) const thread {
    int bit = KEYS_ARE_NEIGHBOURS ? KEY_FRAGMENTS * e + n : 8 * n + e;
    return bytes[bit / 8] >> (bit % 8) & 1;
  }
};

struct Kept {
  Dropout dropout;
  KeptBlock<ROWS, KEPT_EIGHTS> block;
  int first_key;  // of it

  METAL_FUNC void begin(Dropout of_head) thread {
    dropout = of_head;
    first_key = -8 * KEPT_EIGHTS;  // nowhere yet
  }

  // To the block of KEYS keys that begins with `key`.
  METAL_FUNC void move_to(int first_row, int key, Lane lane) thread {
    int begin = key - key % (8 * KEPT_EIGHTS);
    if (KEPT_EIGHTS == KEY_FRAGMENTS || begin != first_key) {
      first_key = begin;
      Dropout of_head = dropout;
      of_head.head = uint(anew(int(dropout.head)));
      block.make(of_head, first_row, first_key, anew(lane));
    }
  }

  // Where KEYS_ARE_NEIGHBOURS a lane has 2 KEY_FRAGMENTS neighbouring keys, else two in each eight (masking.metal, key_of).
  METAL_FUNC KeptRow row(int r, int key, Lane lane) const thread {
    KeptRow kept;
    lane = anew(lane);
    int first = key - first_key + (KEYS_ARE_NEIGHBOURS ? KEY_FRAGMENTS * lane.column : lane.column);
    UNROLL for (int i = 0; i < KEPT_ROW_BYTES; ++i)
      kept.bytes[i] = block.byte(8 * r + lane.row, first / 8 + i) >> (first % 8);
    return kept;
  }
};
#else
struct KeptRow {
  METAL_FUNC bool at(int, int) const thread { return true; }
};
struct Kept {
  Dropout dropout;

  METAL_FUNC void begin(Dropout) thread {}
  METAL_FUNC void move_to(int, int, Lane) thread {}
  METAL_FUNC KeptRow row(int, int, Lane) const thread { return KeptRow(); }
};
#endif
