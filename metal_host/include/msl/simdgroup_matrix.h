// <metal_simdgroup_matrix>: 8x8 matrices of half, bfloat and float, two elements a lane, in Apple's lane order:
// row = lane bits {4, 2, 1}, column = lane bits {3, 0} and the element's.
#pragma once

namespace __mh {

template <typename T>
struct matrix_element {};
template <>
struct matrix_element<half> {
  typedef half type;
};
template <>
struct matrix_element<bfloat> {
  typedef bfloat type;
};
template <>
struct matrix_element<float> {
  typedef float type;
};

inline uint fragment_row(uint lane) { return (lane >> 2 & 4) | (lane >> 1 & 3); }
inline uint fragment_column(uint lane) { return (lane >> 1 & 4) | (lane & 1) << 1; }

}  // namespace __mh

namespace metal {

template <typename T, int Cols, int Rows = Cols>
struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "Metal has simdgroup matrices of 8x8 only");
  typedef vec<typename __mh::matrix_element<T>::type, 2> storage_type;
  storage_type __elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    uint lane = __mh_lane(), row = __mh::fragment_row(lane), column = __mh::fragment_column(lane);
    __elements = storage_type{row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0)};
  }
  thread storage_type& thread_elements() thread { return __elements; }
  const thread storage_type& thread_elements() const thread { return __elements; }
};

typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <typename T, int Cols, int Rows = Cols>
inline simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Cols, Rows> m;
  m.__elements = typename simdgroup_matrix<T, Cols, Rows>::storage_type{value, value};
  return m;
}
template <typename T, int Cols, int Rows = Cols>
inline simdgroup_matrix<T, Cols, Rows> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, Cols, Rows>(value);
}

// matrix_origin = (column, row) of the fragment's corner; elements_per_row is the leading dimension of the memory.
#define __MH_MATRIX_LOADS(space)                                                                        \
  template <typename T>                                                                                 \
  inline __attribute__((always_inline, convergent)) void simdgroup_load(                                \
      thread simdgroup_matrix<T, 8, 8>& m, const space T* src, ulong elements_per_row = 8,              \
      ulong2 matrix_origin = ulong2{0, 0}, bool transpose_matrix = false) {                             \
    uint row = __mh::fragment_row(__mh_lane()), column = __mh::fragment_column(__mh_lane());            \
    src += matrix_origin.y * elements_per_row + matrix_origin.x;                                        \
    ulong first = transpose_matrix ? column * elements_per_row + row : row * elements_per_row + column; \
    ulong second = transpose_matrix ? first + elements_per_row : first + 1;                             \
    __MH_MATRIX_LOAD(T x = src[first]; T y = src[second];)                                              \
    m.__elements = typename simdgroup_matrix<T, 8, 8>::storage_type{x, y};                              \
  }
#define __MH_MATRIX_STORES(space)                                                                                 \
  template <typename T>                                                                                           \
  inline __attribute__((always_inline, convergent)) void simdgroup_store(                                         \
      simdgroup_matrix<T, 8, 8> m, space T* dst, ulong elements_per_row = 8, ulong2 matrix_origin = ulong2{0, 0}, \
      bool transpose_matrix = false) {                                                                            \
    uint row = __mh::fragment_row(__mh_lane()), column = __mh::fragment_column(__mh_lane());                      \
    dst += matrix_origin.y * elements_per_row + matrix_origin.x;                                                  \
    ulong first = transpose_matrix ? column * elements_per_row + row : row * elements_per_row + column;           \
    ulong second = transpose_matrix ? first + elements_per_row : first + 1;                                       \
    T x = m.__elements.x, y = m.__elements.y;                                                                     \
    __MH_MATRIX_STORE(dst[first] = x; dst[second] = y;)                                                           \
  }
__MH_MATRIX_LOADS(device)
__MH_MATRIX_LOADS(threadgroup)
__MH_MATRIX_STORES(device)
__MH_MATRIX_STORES(threadgroup)
#undef __MH_MATRIX_LOADS
#undef __MH_MATRIX_STORES

// Summed in float and rounded once. The two operands and the addend may have types of their own; the result has the
// addend's.
template <typename D, typename A, typename B, typename C>
inline __attribute__((always_inline, convergent)) void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c) {
  static_assert(is_same_v<D, C>, "simdgroup_multiply_accumulate: the result must have the addend's type");
  __mh::ext<float, 2> addend = __builtin_convertvector(c.__elements, __mh::ext<float, 2>);
  typedef typename conditional<is_same_v<A, B>, A, float>::type Operand;
  __mh::ext<float, 2> product = __mh::matrix_product(__mh::converter<Operand, A, 2>::of(a.__elements),
                                                     __mh::converter<Operand, B, 2>::of(b.__elements), addend);
  d.__elements = __builtin_convertvector(product, __mh::ext<D, 2>);
}
template <typename D, typename A, typename B>
inline __attribute__((always_inline, convergent)) void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
                                                                          simdgroup_matrix<A, 8, 8> a,
                                                                          simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0)));
}

template <typename T>
inline __attribute__((always_inline, convergent)) simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a,
                                                                                      simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal
