// What a simdgroup of forward.metal holds, and how it reads keys: what attend.metal asks of a `State`.

constant constexpr int D_FRAGMENTS = (HEAD_DIM + 7) / 8;
constant constexpr int DV_FRAGMENTS = (HEAD_DIM_V + 7) / 8;

typedef Slab<HEAD_DIM, VECTOR> SlabD;
typedef Slab<HEAD_DIM_V, VECTOR_V> SlabV;

// A simdgroup's queries, and their attention over the blocks so far.
struct State {
  Operand q[ROW_FRAGMENTS][D_FRAGMENTS];
  Accumulator o[ROW_FRAGMENTS][DV_FRAGMENTS];  // not yet divided by l
  float m[ROW_FRAGMENTS];  // running maximum of each row's scores
  float l[ROW_FRAGMENTS];  // this lane's part of the running sum of exp(s - m): the four lanes of a row are added at the end
  int first_row;
  Kept kept;

  // Fragment n of a block of k. EDGE: there may be fewer keys than the block has; the last one stands for those past the end.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void load_k(thread Operand* to, AnyKeys keys, int first_key, int n, Lane lane) const thread {
    int key0 = key_of(first_key, n, lane.column, 0);
    int key1 = key_of(first_key, n, lane.column, 1);
    if (EDGE) {
      key0 = min(key0, keys.seqlen - 1);
      key1 = min(key1, keys.seqlen - 1);
    }
    SlabD::load_right_transposed(to, keys.k.at(key0), keys.k.at(key1), lane);
  }

  // Likewise of v.
  template <bool EDGE, typename AnyKeys>
  METAL_FUNC void load_v(thread Operand* to, AnyKeys keys, int first_key, int n, Lane lane) const thread {
    int key = key_of(first_key, n, lane.row, 0);
    if (EDGE) key = min(key, keys.seqlen - 1);
    SlabV::load_right(to, keys.v.at(key), lane);
  }

  // s of a block, where it is there already.
  METAL_FUNC bool take_s(thread Accumulator (&)[ROW_FRAGMENTS][KEY_FRAGMENTS], Lane) const thread { return false; }

  // How the scores of row fragment r are made.
  METAL_FUNC Scoring scoring_of_row(Scoring scoring, int) const thread { return scoring; }
};
