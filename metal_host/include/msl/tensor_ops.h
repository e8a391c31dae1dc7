// What the operations of MetalPerformancePrimitives are made from: scopes, descriptors, and what their operands may be.
#pragma once

namespace metal {

template <size_t Size>
struct execution_simdgroups {
  static_assert(Size > 0, "a scope has at least one simdgroup");
  static constexpr size_t __threads = 32 * Size;
  constexpr uint size() const thread { return Size; }
};
typedef execution_simdgroups<1> execution_simdgroup;
template <size_t Size>
struct execution_threads {
  static_assert(Size == 1, "there is no scope of several threads but simdgroups");
  static constexpr size_t __threads = Size;
  constexpr uint size() const thread { return Size; }
};
typedef execution_threads<1> execution_thread;

template <typename T>
struct __scope_threads : integral_constant<int, 0> {};
template <size_t N>
struct __scope_threads<execution_simdgroups<N>> : integral_constant<int, 32 * N> {};
template <size_t N>
struct __scope_threads<execution_threads<N>> : integral_constant<int, N> {};

}  // namespace metal

namespace mpp {
namespace tensor_ops {

template <typename T>
constexpr T dynamic_length_v = metal::numeric_limits<T>::max();

enum class reduction_operation { sum, max, min };

template <typename ElementType>
struct reduction_operation_identity {
  static constexpr ElementType sum_identity = ElementType(0);
  static constexpr ElementType max_identity = metal::numeric_limits<ElementType>::lowest();
  static constexpr ElementType min_identity = metal::numeric_limits<ElementType>::max();
};

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };

  int m, n, k;
  bool transpose_left, transpose_right;
  bool relaxed_precision;
  mode matmul_mode;

#define __MH_DESCRIPTOR(space)                                                                                       \
  constexpr matmul2d_descriptor(int m_, int n_, int k_ = int(metal::dynamic_extent), bool transpose_left_ = false,   \
                                bool transpose_right_ = false, bool relaxed_precision_ = false,                      \
                                mode mode_ = mode::multiply) space                                                   \
      : m(m_),                                                                                                       \
        n(n_),                                                                                                       \
        k(k_),                                                                                                       \
        transpose_left(transpose_left_),                                                                             \
        transpose_right(transpose_right_),                                                                           \
        relaxed_precision(relaxed_precision_),                                                                       \
        matmul_mode(mode_) {}                                                                                        \
  /* A template's argument: C++17 takes no classes there. Sizes below 2^16, k = 0: dynamic; ~0: not a size. */       \
  constexpr operator ulong() const space {                                                                           \
    bool dynamic = k == int(metal::dynamic_extent) || k == dynamic_length_v<int>;                                    \
    return __size(m) | __size(n) << 16 | (dynamic ? 0 : __size(k)) << 32 | ulong(transpose_left) << 48 |             \
           ulong(transpose_right) << 49 | ulong(relaxed_precision) << 50 |                                           \
           ulong(matmul_mode == mode::multiply_accumulate) << 51;                                                    \
  }
  __MH_DESCRIPTOR(thread)
  __MH_DESCRIPTOR(constant)
#undef __MH_DESCRIPTOR
  static constexpr ulong __size(int n) { return n > 0 && n < 0xffff ? ulong(n) : 0xffff; }
};

}  // namespace tensor_ops
}  // namespace mpp

namespace __mh {

template <typename T>
constexpr ulong type_number = 0;
#define __MH_TYPE_NUMBER(T, number) \
  template <>                      \
  constexpr ulong type_number<T> = number;
__MH_TYPE_NUMBER(half, 1)
__MH_TYPE_NUMBER(bfloat, 2)
__MH_TYPE_NUMBER(float, 3)
__MH_TYPE_NUMBER(char, 4)
__MH_TYPE_NUMBER(uchar, 5)
__MH_TYPE_NUMBER(int, 6)
#undef __MH_TYPE_NUMBER

// The documented combinations of element types (Metal Shading Language 4.0, tables 7.3 and 7.4; uchar as char): bytes
// give int32; float takes every pair with a floating-point type; half and bfloat take no float, and one of themselves.
template <typename L, typename R, typename T>
struct combination {
  template <typename A>
  static constexpr bool one_is = metal::is_same_v<L, A> || metal::is_same_v<R, A>;
  template <typename A>
  static constexpr bool byte = metal::is_same_v<A, char> || metal::is_same_v<A, uchar>;
  static constexpr bool known = type_number<L> && type_number<R> && !one_is<int>, bytes = byte<L> && byte<R>;
  static constexpr bool value = known && (metal::is_same_v<T, int>     ? bytes && metal::is_same_v<L, R>
                                          : metal::is_same_v<T, float> ? !bytes
                                          : metal::is_same_v<T, half> || metal::is_same_v<T, bfloat>
                                              ? one_is<T> && !one_is<float>
                                              : false);
};
template <typename L, typename R, typename T>
constexpr bool multiplies = combination<L, R, T>::value;

// A descriptor and a scope, as constants; how the operands lie in memory.
template <ulong bits, int threads_>
struct product_shape {
  static constexpr int m = bits & 0xffff, n = bits >> 16 & 0xffff, k = bits >> 32 & 0xffff, threads = threads_;
  static constexpr bool transpose_left = bits >> 48 & 1, transpose_right = bits >> 49 & 1, relaxed = bits >> 50 & 1,
                        accumulate = bits >> 51 & 1, dynamic = k == 0;
  static_assert(m != 0xffff && n != 0xffff && k != 0xffff,
                "matmul2d_descriptor: m, n and k must be positive and below 65535; k may be dynamic");
  // An operand's size as it is stored; of a destination or of what it is reduced to: the destination's.
  // `inner`: of a part of it along k.
  static constexpr int columns(int role, int inner) {
    return role == LEFT ? (transpose_left ? m : inner) : role == RIGHT && transpose_right ? inner : n;
  }
  static constexpr int rows(int role, int inner) {
    return role == RIGHT ? (transpose_right ? n : inner) : role == LEFT && transpose_left ? inner : m;
  }
  static constexpr bool transposed(int role) {
    return role == LEFT ? transpose_left : role == RIGHT ? transpose_right : false;
  }
  // The layout may depend on all of the descriptor and on the types.
  template <typename L, typename R, typename T>
  static constexpr ulong salt = (bits * 0x9E3779B97F4A7C15ul >> 52) << 9 | type_number<L> << 6 | type_number<R> << 3 |
                                type_number<T>;
  template <int role, typename L, typename R, typename T>
  using layout = tensor_layout<role, columns(role, k), rows(role, k), transposed(role), threads, salt<L, R, T>>;
};

template <typename T>
struct operand_traits {
  static constexpr bool memory = false, cooperative = false;
};
template <typename Element, typename Extents, typename... Tags>
struct operand_traits<metal::tensor<Element, Extents, metal::tensor_inline, Tags...>> {
  static constexpr bool memory = true, cooperative = false;
  typedef metal::remove_addrspace_t<Element> element;
  static_assert(metal::is_same_v<element, metal::remove_cv_t<element>>,
                "an operand's elements must be unqualified: no const or volatile");
  static_assert(!metal::is_same_v<Element, constant element>, "an operand cannot be in constant memory");
  static_assert(Extents::rank() == 2, "an operand of matmul2d has two dimensions");
};
template <typename T, typename Extents, typename Layout>
struct operand_traits<metal::cooperative_tensor<T, Extents, Layout>> {
  static constexpr bool memory = false, cooperative = true;
  typedef T element;
};
template <typename T>
using operand_element = typename operand_traits<plain<T>>::element;
template <typename T>
constexpr bool is_operand = operand_traits<plain<T>>::memory || operand_traits<plain<T>>::cooperative;

// The inner dimension: the descriptor's, of which a Mac reads all, whatever the extents; or if that is dynamic
// the left operand's.
template <typename Shape, int role, typename Operand>
__MH_INLINE void check_inner_size(const thread Operand& operand) {
  if constexpr (operand_traits<Operand>::memory) {
    constexpr uint axis = role == LEFT ? Shape::transpose_left : !Shape::transpose_right;
    if (long(operand.get_extent(axis)) < Shape::k) __mh_tensor_fault(__MH_FAULT_EXTENTS);
  }
}
template <typename Shape, typename Left, typename Right>
__MH_INLINE long inner_size(const thread Left& left, const thread Right& right) {
  if constexpr (Shape::dynamic) {
    constexpr uint right_axis = Shape::transpose_right ? 0 : 1;
    long inner = long(left.get_extent(Shape::transpose_left ? 1 : 0));
    bool believed = Right::get_static_extent(right_axis) != metal::dynamic_extent;
    if (believed && long(right.get_extent(right_axis)) < inner) __mh_tensor_fault(__MH_FAULT_EXTENTS);
    return inner;
  } else {
    check_inner_size<Shape, LEFT>(left);
    check_inner_size<Shape, RIGHT>(right);
    return Shape::k;
  }
}

// Its sizes are the layout's; the type does not tell them, as on a Mac.
template <typename T, typename Coord, typename Layout>
using tensor_with = metal::cooperative_tensor<T, metal::dextents<Coord, Layout::reduction ? 1 : 2>, Layout>;

}  // namespace __mh
