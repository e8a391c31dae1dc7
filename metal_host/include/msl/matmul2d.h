// <MetalPerformancePrimitives/MetalPerformancePrimitives.h>: matrix products of tensors and cooperative tensors.
#pragma once

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
  static_assert(Shape::threads == 1 || m % 16 == 0 || n % 16 == 0, "At least one of M or N must be a multiple of 16");
  static_assert(Shape::threads == 1 || k % 16 == 0, "K must be dynamic or a multiple of 16");
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
