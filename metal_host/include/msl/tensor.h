// <metal_tensor>: extents, and tensors that a kernel makes itself over memory (tensor_inline). Tensors that the host
// binds do not exist: torch cannot bind one.
#pragma once

#define __MH_INLINE inline __attribute__((always_inline, convergent))

namespace metal {

constexpr size_t dynamic_extent = ~size_t(0);

// The sizes of a tensor's dimensions, the one with neighbours in memory first.
template <typename Index, size_t... Extents>
struct extents {
  typedef Index index_type;
  typedef make_unsigned_t<Index> size_type;
  typedef uint rank_type;
  Index __sizes[sizeof...(Extents)];

  static constexpr rank_type rank() { return sizeof...(Extents); }
  static constexpr rank_type rank_dynamic() { return (0 + ... + uint(Extents == dynamic_extent)); }
  static constexpr size_t static_extent(rank_type r) {
    size_t all[] = {Extents...};
    return all[r];
  }
  constexpr extents() : __sizes{} {
    for (uint r = 0; r < rank(); ++r) __sizes[r] = static_extent(r) == dynamic_extent ? 0 : Index(static_extent(r));
  }
  // All sizes, or the dynamic ones.
  template <typename... I, typename = enable_if_t<(sizeof...(I) > 0) && (sizeof...(I) == sizeof...(Extents) ||
                                                                       sizeof...(I) == rank_dynamic())>>
  constexpr extents(I... sizes) : __sizes{} {
    Index given[] = {Index(sizes)...};
    uint next = 0;
    for (uint r = 0; r < rank(); ++r)
      if (static_extent(r) == dynamic_extent)
        __sizes[r] = given[sizeof...(I) == rank() ? r : next++];
      else
        __sizes[r] = Index(static_extent(r));
  }
  constexpr index_type extent(rank_type r) const { return __sizes[r]; }
};

template <typename Index, size_t Rank, size_t... Extents>
struct __dextents : __dextents<Index, Rank - 1, dynamic_extent, Extents...> {};
template <typename Index, size_t... Extents>
struct __dextents<Index, 0, Extents...> {
  typedef extents<Index, Extents...> type;
};
template <typename Index, size_t Rank>
using dextents = typename __dextents<Index, Rank>::type;

struct tensor_handle {};
struct tensor_offset {};
struct tensor_inline {};

template <typename T>
struct __tensor_value : false_type {};
template <>
struct __tensor_value<half> : true_type {};
template <>
struct __tensor_value<bfloat> : true_type {};
template <>
struct __tensor_value<float> : true_type {};
#define __MH_TENSOR_VALUES(T) \
  template <>                 \
  struct __tensor_value<T> : true_type {}; \
  template <>                 \
  struct __tensor_value<u##T> : true_type {};
__MH_TENSOR_VALUES(char)
__MH_TENSOR_VALUES(short)
__MH_TENSOR_VALUES(int)
__MH_TENSOR_VALUES(long)
#undef __MH_TENSOR_VALUES

template <typename Element, typename Extents, typename Descriptor = tensor_handle, typename... Tags>
struct tensor {
  static_assert(!is_same_v<Descriptor, Descriptor>,
                "only tensors with tensor_inline exist: no host binds a tensor_handle");
};

template <typename Element, typename Extents, typename... Tags>
struct tensor<Element, Extents, tensor_inline, Tags...> {
  static_assert(__tensor_value<remove_cv_t<remove_addrspace_t<Element>>>::value, "no element type of a tensor");
  typedef Element element_type;
  typedef remove_cv_t<remove_addrspace_t<Element>> value_type;
  typedef Extents extents_type;
  typedef typename Extents::index_type index_type;
  typedef typename Extents::size_type size_type;
  typedef typename Extents::rank_type rank_type;
  typedef Element* data_handle_type;
  typedef Element& reference;

  data_handle_type __data;
  Extents __extents;
  index_type __strides[Extents::rank()];

  static constexpr size_t get_rank() { return Extents::rank(); }
  static constexpr size_t get_static_extent(rank_type r) { return Extents::static_extent(r); }
  index_type get_extent(rank_type r) const { return __extents.extent(r); }
  index_type get_stride(rank_type r) const { return __strides[r]; }

  tensor(data_handle_type data, Extents sizes) : __data(data), __extents(sizes) {
    index_type stride = 1;
    for (uint r = 0; r < Extents::rank(); ++r) {
      __strides[r] = stride;
      stride *= sizes.extent(r);
    }
  }
  template <typename I, size_t Rank>
  tensor(data_handle_type data, Extents sizes, array<I, Rank> strides) : __data(data), __extents(sizes) {
    static_assert(Rank == Extents::rank(), "a tensor has a stride for each dimension");
    for (uint r = 0; r < Rank; ++r) __strides[r] = index_type(strides[r]);
  }

  bool __inside(const thread long* at) const {
    bool inside = true;
    for (uint r = 0; r < Extents::rank(); ++r) inside &= at[r] >= 0 && at[r] < long(get_extent(r));
    return inside;
  }
  reference __at(const thread long* at) const {
    long offset = 0;
    for (uint r = 0; r < Extents::rank(); ++r) offset += at[r] * long(__strides[r]);
    return __data[offset];
  }

  // C++17 has no t[x, y].
  template <typename I>
  __MH_INLINE reference operator[](array<I, Extents::rank()> indices) const {
    long at[Extents::rank()];
    for (uint r = 0; r < Extents::rank(); ++r) at[r] = long(indices[r]);
    if (!__inside(at)) __mh_tensor_fault(__MH_FAULT_EXTENTS);
    return __at(at);
  }
  // 0 outside, where stores are dropped.
  template <typename I>
  __MH_INLINE value_type load(array<I, Extents::rank()> indices) const {
    long at[Extents::rank()];
    for (uint r = 0; r < Extents::rank(); ++r) at[r] = long(indices[r]);
    return __inside(at) ? value_type(__at(at)) : value_type(0);
  }
  template <typename... I>
  using __indices = enable_if_t<sizeof...(I) == Extents::rank() && conjunction<is_integral<I>...>::value>;
  template <typename... I, typename = __indices<I...>>
  __MH_INLINE value_type load(I... indices) const {
    long at[] = {long(indices)...};
    return __inside(at) ? value_type(__at(at)) : value_type(0);
  }
  template <typename I>
  __MH_INLINE void store(value_type value, array<I, Extents::rank()> indices) const {
    long at[Extents::rank()];
    for (uint r = 0; r < Extents::rank(); ++r) at[r] = long(indices[r]);
    if (__inside(at)) __at(at) = value;
  }
  template <typename... I, typename = __indices<I...>>
  __MH_INLINE void store(value_type value, I... indices) const {
    long at[] = {long(indices)...};
    if (__inside(at)) __at(at) = value;
  }

  template <size_t... Sizes>
  struct __slice {
    typedef tensor<Element, extents<index_type, Sizes...>, tensor_inline, Tags...> type;
  };
  // The part from `indices` on, of static sizes, or with dynamic_extent (or no sizes at all) as much as there is.
  template <size_t... Sizes, typename... I>
  __MH_INLINE auto slice(I... indices) const {
    static_assert(sizeof...(I) == Extents::rank(), "slice takes an index for each dimension");
    if constexpr (sizeof...(Sizes) == 0) {
      return __dynamic_slice<>(indices...);
    } else {
      static_assert(sizeof...(Sizes) == Extents::rank(), "slice takes an extent for each dimension, or none");
      return __sliced<typename __slice<Sizes...>::type>(indices...);
    }
  }
  template <size_t... Sizes, typename... I>
  __MH_INLINE auto __dynamic_slice(I... indices) const {
    if constexpr (sizeof...(Sizes) == Extents::rank())
      return __sliced<typename __slice<Sizes...>::type>(indices...);
    else
      return __dynamic_slice<Sizes..., dynamic_extent>(indices...);
  }
  template <typename Slice, typename... I>
  __MH_INLINE Slice __sliced(I... indices) const {
    long at[] = {long(indices)...};
    array<index_type, Extents::rank()> strides;
    typename Slice::extents_type sizes;
    bool inside = true;
    for (uint r = 0; r < Extents::rank(); ++r) {
      strides[r] = __strides[r];
      if (Slice::get_static_extent(r) == dynamic_extent) sizes.__sizes[r] = index_type(long(get_extent(r)) - at[r]);
      inside &= at[r] >= 0 && at[r] + long(sizes.extent(r)) <= long(get_extent(r)) && long(sizes.extent(r)) >= 0;
    }
    if (!inside) __mh_tensor_fault(__MH_FAULT_EXTENTS);
    return Slice(&__at(at), sizes, strides);
  }
};

#define __MH_TENSOR_GUIDES(space)                                                          \
  template <typename T, typename Extents>                                                  \
  tensor(space T*, Extents) -> tensor<space T, Extents, tensor_inline>;                    \
  template <typename T, typename Extents, typename I, size_t Rank>                         \
  tensor(space T*, Extents, array<I, Rank>) -> tensor<space T, Extents, tensor_inline>;
__MH_TENSOR_GUIDES(device)
__MH_TENSOR_GUIDES(constant)
__MH_TENSOR_GUIDES(threadgroup)
__MH_TENSOR_GUIDES(thread)
#undef __MH_TENSOR_GUIDES

template <typename T>
struct __is_tensor : false_type {};
template <typename Element, typename Extents, typename... Tags>
struct __is_tensor<tensor<Element, Extents, tensor_inline, Tags...>> : true_type {};

}  // namespace metal
