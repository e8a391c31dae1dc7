// <MetalPerformancePrimitives/MetalPerformancePrimitives.h>: matrix products of tensors and cooperative tensors.
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

// The inner dimension: the descriptor's, or if that is dynamic the left operand's.
template <typename Shape, typename Left, typename Right>
__MH_INLINE long inner_size(const thread Left& left, const thread Right& right) {
  if constexpr (Shape::dynamic) {
    constexpr uint right_axis = Shape::transpose_right ? 0 : 1;
    long inner = long(left.get_extent(Shape::transpose_left ? 1 : 0));
    bool believed = Right::get_static_extent(right_axis) != metal::dynamic_extent;
    if (believed && long(right.get_extent(right_axis)) < inner) __mh_tensor_fault(__MH_FAULT_EXTENTS);
    return inner;
  } else {
    return Shape::k;
  }
}

template <typename Coord, typename Layout>
struct extents_of {
  typedef metal::extents<Coord, Layout::columns, Layout::rows> type;
};
template <typename Coord, int columns, int rows, bool transposed, int threads, ulong salt>
struct extents_of<Coord, tensor_layout<ROWS, columns, rows, transposed, threads, salt>> {
  typedef metal::extents<Coord, rows> type;
};
template <typename Coord, int columns, int rows, bool transposed, int threads, ulong salt>
struct extents_of<Coord, tensor_layout<COLUMNS, columns, rows, transposed, threads, salt>> {
  typedef metal::extents<Coord, columns> type;
};
template <typename T, typename Coord, typename Layout>
using tensor_with = metal::cooperative_tensor<T, typename extents_of<Coord, Layout>::type, Layout>;

}  // namespace __mh

#ifdef __NVPTX__
#include "nvptx_matmul2d.h"
#else
#include "cpu_matmul2d.h"
#endif

namespace __mh {

// What a product's operands must be. A class, to be told with the place of the call.
template <typename Shape, typename Left, typename Right, typename T>
struct checked_inputs {
  static constexpr bool left = operand_traits<Left>::cooperative, right = operand_traits<Right>::cooperative;
  static constexpr int m = Shape::m, n = Shape::n, k = Shape::k;
  static_assert(multiplies<operand_element<Left>, operand_element<Right>, T>,
                "matmul2d: no such combination of element types");
  static_assert(!(left || right) || Shape::threads == 32, "Input cooperative tensors require a single SIMD group");
  static_assert(!(left || right) || !Shape::dynamic,
                "Inner dimension cannot be dynamic with input cooperative tensors");
  static_assert(!(left && right) || ((m == 16 || m == 32) && (n == 16 || n == 32) && (k == 16 || k == 32)),
                "M, N and K must be 16 or 32 if both inputs are cooperative tensors");
  static_assert(!(left && right) || m == 32 || n == 32 || k == 32,
                "At least one of M, N, K must be 32 if both inputs are cooperative tensors");
  static constexpr bool value = true;
};
// Static extents are not checked against on a Mac: the operation reads and writes whole tiles.
template <typename Shape, int role, typename Tensor>
struct checked_extents {
  static constexpr bool value = true;
};
template <typename Shape, int role, typename Element, typename Extents, typename... Tags>
struct checked_extents<Shape, role, metal::tensor<Element, Extents, metal::tensor_inline, Tags...>> {
  static constexpr bool covers(uint axis, int size) {
    return Extents::static_extent(axis) == metal::dynamic_extent || Extents::static_extent(axis) >= size_t(size);
  }
  static_assert(covers(0, Shape::columns(role, Shape::k)) && covers(1, Shape::rows(role, Shape::k)),
                "matmul2d: the operand's static extents are smaller than the descriptor's");
  static constexpr bool value = true;
};
template <typename Tensor, typename Expected>
struct checked_tensor {
  static constexpr bool value = true;
};
template <typename T, typename Extents, typename Layout, typename Expected>
struct checked_tensor<metal::cooperative_tensor<T, Extents, Layout>, Expected> {
  static_assert(metal::is_same_v<Layout, typename Expected::layout>,
                "matmul2d: the cooperative tensor is of another operation or operand, or for other element types");
  static constexpr bool value = true;
};

}  // namespace __mh

namespace mpp {
namespace tensor_ops {

template <ulong Descriptor, typename Scope, class... Args>
class matmul2d {
  static constexpr int __threads = metal::__scope_threads<Scope>::value;
  static_assert(__threads > 0, "matmul2d: the scope must be execution_thread or execution_simdgroups<N>");
  typedef __mh::product_shape<Descriptor, __threads> __shape;
  template <typename L, typename R, typename T, int role>
  using __layout = typename __shape::template layout<role, L, R, T>;
  template <typename Left, typename Right, typename T, typename Coord, int role>
  using __result = __mh::tensor_with<
      T, Coord, __layout<__mh::operand_element<Left>, __mh::operand_element<Right>, T, role>>;

 public:
  using scope = Scope;
  static constexpr constant matmul2d_descriptor descriptor = {
      __shape::m, __shape::n, __shape::dynamic ? int(metal::dynamic_extent) : __shape::k, __shape::transpose_left,
      __shape::transpose_right, __shape::relaxed,
      __shape::accumulate ? matmul2d_descriptor::mode::multiply_accumulate : matmul2d_descriptor::mode::multiply};

  // L, R, T: element types of the inputs and of the destination. For inputs.
  template <typename L, typename R, typename T, typename Coord = int>
  using cooperative_tensor_left_input_t = __mh::tensor_with<L, Coord, __layout<L, R, T, __mh::LEFT>>;
  template <typename L, typename R, typename T, typename Coord = int>
  using cooperative_tensor_right_input_t = __mh::tensor_with<R, Coord, __layout<L, R, T, __mh::RIGHT>>;
  // Left, Right: types of the operands, in memory or cooperative.
  template <typename Left, typename Right, typename T, typename Coord = int>
  using cooperative_tensor_destination_t = __result<Left, Right, T, Coord, __mh::DESTINATION>;
  template <typename Left, typename Right, typename T, typename Coord = int>
  using cooperative_tensor_row_reduction_destination_t = __result<Left, Right, T, Coord, __mh::ROWS>;
  template <typename Left, typename Right, typename T, typename Coord = int>
  using cooperative_tensor_column_reduction_destination_t = __result<Left, Right, T, Coord, __mh::COLUMNS>;

#define __MH_INPUT(side, Element)                                                                                      \
  template <typename L, typename R, typename T, typename Coord = int>                                                  \
  __MH_INLINE cooperative_tensor_##side##_input_t<L, R, T, Coord> get_##side##_input_cooperative_tensor()              \
      const thread {                                                                                                   \
    static_assert(__mh::checked_inputs<__shape, cooperative_tensor_##side##_input_t<L, R, T, Coord>,                   \
                                       metal::tensor<device Element, metal::dextents<int, 2>, metal::tensor_inline>,   \
                                       T>::value, "");                                                                 \
    return {};                                                                                                         \
  }                                                                                                                    \
  /* The same registers. `from` must have this layout: is_compatible_as_... says so. */                                \
  template <typename L, typename R, typename T, typename Coord = int, typename Source, typename Extents,               \
            typename Layout>                                                                                           \
  __MH_INLINE cooperative_tensor_##side##_input_t<L, R, T, Coord> get_##side##_input_cooperative_tensor(               \
      const thread metal::cooperative_tensor<Source, Extents, Layout>& from) const thread {                            \
    auto to = get_##side##_input_cooperative_tensor<L, R, T, Coord>();                                                 \
    static_assert(metal::is_same_v<Source, typename decltype(to)::element_type>,                                       \
                  "the cooperative tensor's elements must have the input's type");                                     \
    to.__copy_slots(from);                                                                                             \
    return to;                                                                                                         \
  }                                                                                                                    \
  template <typename L, typename R, typename T, typename Source, typename Extents, typename Layout>                    \
  __MH_INLINE bool is_compatible_as_##side##_input(                                                                    \
      const thread metal::cooperative_tensor<Source, Extents, Layout>& from) const thread {                            \
    typedef cooperative_tensor_##side##_input_t<L, R, T> To;                                                           \
    return metal::is_same_v<Source, typename To::element_type> && from.__placement.same(To().__placement);             \
  }
  __MH_INPUT(left, R)
  __MH_INPUT(right, L)
#undef __MH_INPUT

#define __MH_DESTINATION(name)                                                                                \
  template <typename Left, typename Right, typename T, typename Coord = int>                                  \
  __MH_INLINE cooperative_tensor_##name##_t<Left, Right, T, Coord> get_##name##_cooperative_tensor()          \
      const thread {                                                                                          \
    static_assert(__mh::is_operand<Left> && __mh::is_operand<Right>,                                          \
                  "a destination is told the types of the operands, tensors or cooperative tensors");         \
    static_assert(__mh::checked_inputs<__shape, __mh::plain<Left>, __mh::plain<Right>, T>::value, "");        \
    return {};                                                                                                \
  }
  __MH_DESTINATION(destination)
  __MH_DESTINATION(row_reduction_destination)
  __MH_DESTINATION(column_reduction_destination)
#undef __MH_DESTINATION

  // destination = left right, or destination + left right. All threads of the scope must come here together.
  template <typename Left, typename Right, typename Destination>
  __MH_INLINE void run(thread Left& left, thread Right& right, thread Destination& destination) const thread {
    typedef __mh::operand_element<Left> L;
    typedef __mh::operand_element<Right> R;
    typedef __mh::operand_element<Destination> T;
    static_assert(__mh::checked_inputs<__shape, Left, Right, T>::value, "");
    static_assert(__mh::checked_tensor<Left, cooperative_tensor_left_input_t<L, R, T>>::value, "");
    static_assert(__mh::checked_tensor<Right, cooperative_tensor_right_input_t<L, R, T>>::value, "");
    static_assert(__mh::checked_tensor<Destination, cooperative_tensor_destination_t<Left, Right, T>>::value, "");
    static_assert(__mh::checked_extents<__shape, __mh::LEFT, Left>::value, "");
    static_assert(__mh::checked_extents<__shape, __mh::RIGHT, Right>::value, "");
    static_assert(__mh::checked_extents<__shape, __mh::DESTINATION, Destination>::value, "");
    __mh::multiply<__shape>(left, right, destination);
  }
};

#define __MH_REDUCE(name, kind, what)                                                                              \
  /* One result for each; `identity` is where it starts, 0 if left out, whatever the operation. */                 \
  template <typename T, typename SourceExtents, typename Extents, typename SourceLayout, typename Layout>          \
  __MH_INLINE void name(thread metal::cooperative_tensor<T, SourceExtents, SourceLayout>& source,                  \
                        thread metal::cooperative_tensor<T, Extents, Layout>& destination,                         \
                        reduction_operation operation = reduction_operation::sum,                                  \
                        T identity = reduction_operation_identity<T>::sum_identity) {                              \
    static_assert(SourceLayout::role == __mh::DESTINATION && Layout::role == __mh::kind &&                         \
                      SourceLayout::rows == Layout::rows && SourceLayout::columns == Layout::columns,              \
                  #name ": the destination must be the operation's for the reduction of " what);                   \
    static_assert(SourceLayout::threads == 32, #name ": the operation's scope must be execution_simdgroup");       \
    __mh::reduce(source, destination, 1 + uint(operation), identity);                                              \
  }
__MH_REDUCE(reduce_rows, ROWS, "rows")
__MH_REDUCE(reduce_columns, COLUMNS, "columns")
#undef __MH_REDUCE

// May destination.map_iterator(iterator of source) be called?
template <typename S, typename T, typename SourceExtents, typename Extents, typename SourceLayout, typename Layout>
__MH_INLINE bool is_iterator_compatible(const thread metal::cooperative_tensor<S, SourceExtents, SourceLayout>& source,
                                        const thread metal::cooperative_tensor<T, Extents, Layout>& destination) {
  return source.__placement.maps_to(destination.__placement);
}

}  // namespace tensor_ops
}  // namespace mpp

// A name of Apple's that sources use.
namespace __tensor_ops_detail {
template <typename T>
using __remove_addrspace_t = metal::remove_addrspace_t<T>;
}
