// A causal FlashAttention-2 forward for half, D = HEAD_DIM: what the runner's checks are tried on.
//
// One threadgroup takes BLOCK_Q query rows of one head; each of its simdgroups 8 of them. S, P and O stay in simdgroup matrices.
// STAGED: K and V go through threadgroup memory. Otherwise every simdgroup reads its fragments from device memory.
#include <metal_stdlib>
using namespace metal;

#define SIMDGROUPS 4
#define BLOCK_Q (SIMDGROUPS * 8)
#define BLOCK_K 32
#define PAD 8
#define UNROLL _Pragma("clang loop unroll(full)")

struct Params {
  int seqlen;
  float scale_log2e;  // softmax_scale * log2(e)
};

struct Coordinate {  // of a lane's first element in an 8x8 fragment
  short row, column;
  static Coordinate of(ushort lane) {
    Coordinate c;
    c.row = (lane >> 2 & 4) | (lane >> 1 & 3);
    c.column = (lane >> 1 & 4) | (lane & 1) << 1;
    return c;
  }
};

// Rows first_row.. of a row-major matrix with `rows` rows; those behind it are zero.
template <bool transposed>
void load_fragment(thread simdgroup_half8x8& m, const device half* p, int first_row, int first_column, int rows, Coordinate at) {
  UNROLL for (short e = 0; e < 2; ++e) {
    const int row = first_row + (transposed ? at.column + e : at.row);
    const int column = first_column + (transposed ? at.row : at.column + e);
    m.thread_elements()[e] = row < rows ? p[row * HEAD_DIM + column] : half(0);
  }
}

void stage(threadgroup half* tile, const device half* p, int first_row, int rows, ushort thread_index) {
  for (int i = thread_index; i < BLOCK_K * HEAD_DIM; i += SIMDGROUPS * 32) {
    const int row = i / HEAD_DIM, column = i % HEAD_DIM;
    tile[row * (HEAD_DIM + PAD) + column] = first_row + row < rows ? p[(first_row + row) * HEAD_DIM + column] : half(0);
  }
}

float row_max(float x) {  // over the four lanes that hold a fragment's row
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

[[max_total_threads_per_threadgroup(SIMDGROUPS * 32)]] kernel void attention(
    const device half* q [[buffer(0)]], const device half* k [[buffer(1)]], const device half* v [[buffer(2)]],  // (H, L, D)
    device half* o [[buffer(3)]],
    device float* lse [[buffer(4)]],  // (H, L), natural logarithm
    constant Params& params [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup half k_tile[BLOCK_K * (HEAD_DIM + PAD)];
  threadgroup half v_tile[BLOCK_K * (HEAD_DIM + PAD)];
  threadgroup half o_tile[SIMDGROUPS * 8 * HEAD_DIM];
  const int seqlen = params.seqlen;
  const int first_row = int(group.x) * BLOCK_Q + simdgroup * 8;
  const long head = long(group.y) * seqlen * HEAD_DIM;
  q += head;
  k += head;
  v += head;
  o += head;
  const Coordinate at = Coordinate::of(lane);

  simdgroup_half8x8 q_fragment[HEAD_DIM / 8];
  simdgroup_float8x8 o_fragment[HEAD_DIM / 8];
  UNROLL for (short d = 0; d < HEAD_DIM / 8; ++d) {
    load_fragment<false>(q_fragment[d], q, first_row, d * 8, seqlen, at);
    o_fragment[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  float maximum = -INFINITY, sum = 0.0f;

  const int visible = min(seqlen, int(group.x + 1) * BLOCK_Q);
  for (int first_key = 0; first_key < visible; first_key += BLOCK_K) {
#if STAGED
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage(k_tile, k, first_key, seqlen, thread_index);
    stage(v_tile, v, first_key, seqlen, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    simdgroup_float8x8 s[BLOCK_K / 8];
    UNROLL for (short j = 0; j < BLOCK_K / 8; ++j) {
      s[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      UNROLL for (short d = 0; d < HEAD_DIM / 8; ++d) {
        simdgroup_half8x8 k_fragment;
#if STAGED
        simdgroup_load(k_fragment, k_tile + j * 8 * (HEAD_DIM + PAD) + d * 8, HEAD_DIM + PAD, ulong2(0, 0), true);
#else
        load_fragment<true>(k_fragment, k, first_key + j * 8, d * 8, seqlen, at);
#endif
        simdgroup_multiply_accumulate(s[j], q_fragment[d], k_fragment, s[j]);
      }
    }
    float block_maximum = -INFINITY;
    UNROLL for (short j = 0; j < BLOCK_K / 8; ++j) {
      UNROLL for (short e = 0; e < 2; ++e) {
        const int key = first_key + j * 8 + at.column + e;
        const float score = s[j].thread_elements()[e] * params.scale_log2e;
        s[j].thread_elements()[e] = key <= first_row + at.row && key < seqlen ? score : -INFINITY;
        block_maximum = max(block_maximum, s[j].thread_elements()[e]);
      }
    }
    const float new_maximum = max(maximum, row_max(block_maximum));
    const float correction = fast::exp2(maximum - new_maximum);
    maximum = new_maximum;
    float block_sum = 0.0f;
    simdgroup_half8x8 p[BLOCK_K / 8];
    UNROLL for (short j = 0; j < BLOCK_K / 8; ++j) {
      UNROLL for (short e = 0; e < 2; ++e) {
        const float weight = fast::exp2(s[j].thread_elements()[e] - maximum);
        block_sum += weight;
        p[j].thread_elements()[e] = half(weight);
      }
    }
    sum = sum * correction + row_sum(block_sum);
    UNROLL for (short d = 0; d < HEAD_DIM / 8; ++d) {
      o_fragment[d].thread_elements() *= correction;
      UNROLL for (short j = 0; j < BLOCK_K / 8; ++j) {
        simdgroup_half8x8 v_fragment;
#if STAGED
        simdgroup_load(v_fragment, v_tile + j * 8 * (HEAD_DIM + PAD) + d * 8, HEAD_DIM + PAD);
#else
        load_fragment<false>(v_fragment, v, first_key + j * 8, d * 8, seqlen, at);
#endif
        simdgroup_multiply_accumulate(o_fragment[d], p[j], v_fragment, o_fragment[d]);
      }
    }
  }

  // Through threadgroup memory, so that a row is written in one piece.
  threadgroup half* o_rows = o_tile + simdgroup * 8 * HEAD_DIM;
  UNROLL for (short d = 0; d < HEAD_DIM / 8; ++d) {
    simdgroup_half8x8 result;
    result.thread_elements() = half2(o_fragment[d].thread_elements() / sum);
    simdgroup_store(result, o_rows + d * 8, HEAD_DIM);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (short row = 0; row < 8; ++row) {
    if (first_row + row < seqlen) {
      for (short column = lane; column < HEAD_DIM; column += 32) {
        o[(first_row + row) * HEAD_DIM + column] = o_rows[row * HEAD_DIM + column];
      }
    }
  }
  if (at.column == 0 && first_row + at.row < seqlen) {
    lse[group.y * seqlen + first_row + at.row] = (maximum + log2(sum)) * M_LN2_F;
  }
}
