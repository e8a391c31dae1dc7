// How fast tensor operations are. REPEATS and T are defined by the host (probes.py).
#include <metal_stdlib>
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;

// REPEATS times 4 products of 16x16 by 16x32 matrices a simdgroup, float32 sums of operands in T, which do not wait for each other.
kernel void products(device float* to [[buffer(0)]], uint thread_index [[thread_position_in_grid]]) {
  constexpr auto descriptor =
      matmul2d_descriptor(16, 32, 16, false, false, false, matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<descriptor, execution_simdgroup> product;
  auto a = product.template get_left_input_cooperative_tensor<T, T, float>();
  auto b = product.template get_right_input_cooperative_tensor<T, T, float>();
  auto x0 = product.template get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
  auto x1 = x0, x2 = x0, x3 = x0;
  for (ushort i = 0; i < a.get_capacity(); ++i) a[i] = T(to[0]);
  for (ushort i = 0; i < b.get_capacity(); ++i) b[i] = T(to[1]);
  for (ushort i = 0; i < x0.get_capacity(); ++i) x0[i] = x1[i] = x2[i] = x3[i] = 0.0f;
  for (int n = 0; n < REPEATS; ++n) {
    product.run(a, b, x0);
    product.run(a, b, x1);
    product.run(a, b, x2);
    product.run(a, b, x3);
  }
  if (x0[0] + x1[0] + x2[0] + x3[0] == 1.5f) to[thread_index % 2] = x0[0];
}
