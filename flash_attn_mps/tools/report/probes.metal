// What a GPU and its compiler are, in numbers. REPEATS and T are defined by the host (probes.py).
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// The version of the language, whether NaN and infinities are honoured, the width of a simdgroup.
kernel void language(device float* to [[buffer(0)]], device const float* one_and_infinity [[buffer(1)]],
                     uint width [[threads_per_simdgroup]]) {
  float infinity = one_and_infinity[1];
  to[0] = float(__METAL_VERSION__);
  to[1] = isfinite(infinity) ? 0.0f : 1.0f;
  to[2] = 0.0f * infinity != 0.0f ? 1.0f : 0.0f;
  to[3] = float(width);
}

// Which elements of an 8x8 matrix each lane holds: it stores its number into both.
kernel void lanes(device float* to [[buffer(0)]], ushort index [[thread_index_in_simdgroup]]) {
  simdgroup_matrix<float, 8, 8> x = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  x.thread_elements()[0] = float(2 * index);
  x.thread_elements()[1] = float(2 * index + 1);
  simdgroup_store(x, to, 8);
}

// Nothing: what a launch costs.
kernel void nothing(device float* to [[buffer(0)]], uint thread_index [[thread_position_in_grid]]) {
  if (thread_index == 0xffffffffu) to[0] = 0.0f;
}

// REPEATS times 8 multiplications and additions a thread, which do not wait for each other.
kernel void multiply_add(device float* to [[buffer(0)]], uint thread_index [[thread_position_in_grid]]) {
  float x[8], y = to[0], z = to[1];
  for (int i = 0; i < 8; ++i) x[i] = to[2 + i];
  for (int n = 0; n < REPEATS; ++n)
    for (int i = 0; i < 8; ++i) x[i] = fma(x[i], y, z);
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += x[i];
  if (sum == 1.5f) to[thread_index % 8] = sum;
}

// REPEATS times 8 products of 8x8 matrices a simdgroup, float32 sums of operands in T.
kernel void products(device float* to [[buffer(0)]], uint thread_index [[thread_position_in_grid]]) {
  simdgroup_matrix<T, 8, 8> a, b;
  for (int i = 0; i < 2; ++i) a.thread_elements()[i] = b.thread_elements()[i] = T(to[i]);
  simdgroup_matrix<float, 8, 8> x[8];
  for (int i = 0; i < 8; ++i) x[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int n = 0; n < REPEATS; ++n)
    for (int i = 0; i < 8; ++i) simdgroup_multiply_accumulate(x[i], a, b, x[i]);
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += x[i].thread_elements()[0];
  if (sum == 1.5f) to[thread_index % 8] = sum;
}
