// What the tensor operations of this GPU, macOS and compiler do (tensorops_probe.py judges it): where each element of a
// cooperative tensor is, and whether products come out right that are filled and read at these places. CASES, SLOTS and
// PRODUCTS are defined by the host.
#if __METAL_VERSION__ < 400
#error "Metal 4 is needed, and an older version is asked for"
#endif
using namespace mpp::tensor_ops;

#define EACH_ELEMENT _Pragma("clang loop unroll(full)") for (ushort i = 0; i < t.get_capacity(); ++i)

// A tensor of ROWS x COLUMNS, of which a lane has some elements.
template <int ROWS, int COLUMNS>
struct Extents {
  // The place of a lane's i-th element, row by row; -1 for padding, -2 for what is none.
  template <typename Tensor>
  static int place(thread Tensor& t, ushort i) {
    if (!t.is_valid_element(i)) return -1;
    auto index = t.get_multidimensional_index(i);
    int column = int(index[0]), row = int(index[1]);
    return row >= 0 && row < ROWS && column >= 0 && column < COLUMNS ? row * COLUMNS + column : -2;
  }

  // How many elements the lane has room for, and the places of the first SLOTS.
  template <typename Tensor>
  static void report(thread Tensor& t, device int* to) {
    to[0] = int(t.get_capacity());
    EACH_ELEMENT if (i < SLOTS) to[1 + i] = place(t, i);
  }

  // From a matrix in memory; of the transpose of one, if TRANSPOSED.
  template <bool TRANSPOSED, typename T, typename Tensor>
  static void load(thread Tensor& t, device const float* from) {
    EACH_ELEMENT {
      int n = place(t, i);
      if (n >= 0) t[i] = T(from[TRANSPOSED ? n % COLUMNS * ROWS + n / COLUMNS : n]);
    }
  }

  template <typename Tensor>
  static void store(thread Tensor& t, device float* to) {
    EACH_ELEMENT {
      int n = place(t, i);
      if (n >= 0) to[n] = t[i];
    }
  }
};

// One kind of product that cooperative.metal makes: 16x16 by 16x32, which lies as 32x16 if TRANSPOSED.
template <typename T, bool TRANSPOSED, matmul2d_descriptor::mode MODE>
void probe(device int* layouts, device float* products, device const float* left, device const float* right,
           device const float* destination, ushort lane) {
  constexpr auto descriptor = matmul2d_descriptor(16, 32, 16, false, TRANSPOSED, false, MODE);
  matmul2d<descriptor, execution_simdgroup> operation;
  auto a = operation.template get_left_input_cooperative_tensor<T, T, float>();
  auto b = operation.template get_right_input_cooperative_tensor<T, T, float>();
  auto c = operation.template get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
  using A = Extents<16, 16>;
  using B = Extents<TRANSPOSED ? 32 : 16, TRANSPOSED ? 16 : 32>;
  using C = Extents<16, 32>;
  A::report(a, layouts + lane * (1 + SLOTS));
  B::report(b, layouts + (32 + lane) * (1 + SLOTS));
  C::report(c, layouts + (64 + lane) * (1 + SLOTS));
  for (int n = 0; n < PRODUCTS; ++n) {
    A::template load<false, T>(a, left + n * 256);
    B::template load<TRANSPOSED, T>(b, right + n * 512);
    C::template load<false, float>(c, destination + n * 512);
    operation.run(a, b, c);
    C::store(c, products + n * 512);
  }
}

// A threadgroup, of one simdgroup, for each case.
kernel void tensorops_probe(device int* layouts [[buffer(0)]], device float* products [[buffer(1)]],
                            device const float* left [[buffer(2)]], device const float* right [[buffer(3)]],
                            device const float* destination [[buffer(4)]],
                            ushort lane [[thread_index_in_simdgroup]],
                            uint group [[threadgroup_position_in_grid]]) {
  layouts += group * (96 * (1 + SLOTS));
  products += group * (512 * PRODUCTS);
#define CASE(n, T, TRANSPOSED, MODE) \
  if (group == n)                   \
    probe<T, TRANSPOSED, matmul2d_descriptor::mode::MODE>(layouts, products, left, right, destination, lane);
  CASES
}
