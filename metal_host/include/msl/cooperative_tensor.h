// <metal_cooperative_tensor>: tensors whose elements are dealt out to the threads of a scope. The back end says which
// element a thread's slot holds (__mh::placement): on the CPU a parameter of the launch.
#pragma once

namespace metal {
template <typename ElementType, typename Extents, typename Layout>
struct cooperative_tensor;
}

namespace __mh {

enum role { LEFT, RIGHT, DESTINATION, ROWS, COLUMNS, LINEAR };  // runtime/tensor.c

// columns x rows elements, as they are stored: the first index of an element is its column. Of a reduction's result
// the columns and rows are those of the tensor that is reduced. `salt`: what else a layout may depend on.
template <int role_, int columns_, int rows_, bool transposed_, int threads_, ulong salt_>
struct tensor_layout {
  static constexpr int role = role_, columns = columns_, rows = rows_, threads = threads_;
  static constexpr bool transposed = transposed_;
  static constexpr bool reduction = role == ROWS || role == COLUMNS;
  static constexpr int across = (columns + 15) / 16, down = (rows + 15) / 16;
  // The most slots that a thread may have under any layout.
  static constexpr int slots = role == LINEAR    ? (columns * rows + threads - 1) / threads
                               : role == ROWS    ? down * 16
                               : role == COLUMNS ? across * 16
                               : threads == 1    ? columns * rows
                                                 : 16 * ((across * down + threads / 32 - 1) / (threads / 32));
  static_assert(threads > 1 || slots <= 12288, "the tensor is too large for one thread");
  static_assert(columns < 1 << 14 && rows < 1 << 14 && columns * rows <= 1 << 16, "the tensor is too large");
  static constexpr ulong key =
      ulong(role) | ulong(transposed) << 3 | ulong(columns) << 4 | ulong(rows) << 18 | ulong(threads) << 32 |
      salt_ << 43;
};

// What no thread has written.
template <typename T>
inline T undefined_element() {
  if constexpr (metal::is_floating_point_v<T>)
    return T(__mh_nan());
  else
    return T(0x80808080);
}

template <typename T>
struct plain_type {
  typedef metal::remove_cv_t<metal::remove_addrspace_t<T>> type;
};
template <typename T>
struct plain_type<T&> : plain_type<T> {};
#define __MH_PLAIN(space) \
  template <typename T>   \
  struct plain_type<space T&> : plain_type<T> {};
__MH_PLAIN(thread)
__MH_PLAIN(device)
__MH_PLAIN(threadgroup)
__MH_PLAIN(constant)
#undef __MH_PLAIN
template <typename T>
using plain = typename plain_type<T>::type;

// Does a tensor in memory have the element (column, row), as far as an operation checks? Static extents it believes.
template <typename Tensor>
__MH_INLINE bool has(const Tensor& tensor, const thread long* at) {
  bool inside = true;
  for (uint r = 0; r < Tensor::get_rank(); ++r)
    inside &= Tensor::get_static_extent(r) != metal::dynamic_extent || at[r] < long(tensor.get_extent(r));
  return inside;
}

}  // namespace __mh

#ifdef __NVPTX__
#include "nvptx_tensor.h"
#else
#include "cpu_tensor.h"
#endif

namespace metal {

template <typename Tensor>
struct __cooperative_iterator {
  Tensor* __tensor;
  int __slot;
  __MH_INLINE auto& operator*() const { return (*__tensor)[__slot]; }
  __MH_INLINE thread __cooperative_iterator& operator++() thread {
    ++__slot;
    return *this;
  }
  __MH_INLINE __cooperative_iterator operator++(int) thread {
    __cooperative_iterator before = *this;
    ++__slot;
    return before;
  }
  friend bool operator==(__cooperative_iterator a, __cooperative_iterator b) { return a.__slot == b.__slot; }
  friend bool operator!=(__cooperative_iterator a, __cooperative_iterator b) { return a.__slot != b.__slot; }
};

template <typename ElementType, typename Extents, typename Layout>
struct cooperative_tensor {
  typedef ElementType element_type;
  typedef ElementType value_type;
  typedef Extents extents_type;
  typedef Layout layout;
  typedef typename Extents::index_type index_type;
  typedef typename Extents::size_type size_type;
  typedef typename Extents::rank_type rank_type;
  typedef short thread_index_type;
  typedef ushort thread_size_type;

  __mh::placement<Layout> __placement;
  ElementType __elements[Layout::slots];

  // Nobody initialises a cooperative tensor on a Mac either; here that shows.
  cooperative_tensor() {
    for (int i = 0; i < Layout::slots; ++i) __elements[i] = __mh::undefined_element<ElementType>();
  }

  static constexpr rank_type get_rank() { return Extents::rank(); }
  static constexpr size_t get_static_extent(rank_type r) { return Extents::static_extent(r); }
  index_type get_extent(rank_type r) const thread { return index_type(Extents::static_extent(r)); }

  __MH_INLINE thread_size_type get_capacity() const thread { return thread_size_type(__placement.capacity()); }
  __MH_INLINE thread ElementType& operator[](int slot) thread {
    __placement.check(slot);
    return __elements[slot];
  }
  __MH_INLINE const thread ElementType& operator[](int slot) const thread {
    __placement.check(slot);
    return __elements[slot];
  }
  __MH_INLINE ElementType get(int slot) const thread { return (*this)[slot]; }
  __MH_INLINE void set(int slot, ElementType value) thread { (*this)[slot] = value; }
  __MH_INLINE bool is_valid_element(int slot) const thread { return __placement.element(slot) >= 0; }
  // (column, row): the fast index first. Of a slot without an element: just outside.
  __MH_INLINE array<index_type, Extents::rank()> get_multidimensional_index(int slot) const thread {
    int element = __placement.element(slot);
    array<index_type, Extents::rank()> index;
    for (uint r = 0; r < Extents::rank(); ++r) index[r] = index_type(Extents::static_extent(r));
    if (element < 0) return index;
    index[0] = index_type(Layout::reduction ? element : element % Layout::columns);
    if constexpr (Extents::rank() == 2) index[1] = index_type(element / Layout::columns);
    return index;
  }

  // Over all slots, those without an element too.
  typedef __cooperative_iterator<thread cooperative_tensor> iterator;
  typedef __cooperative_iterator<const thread cooperative_tensor> const_iterator;
  __MH_INLINE iterator begin() thread { return {this, 0}; }
  __MH_INLINE iterator end() thread { return {this, int(get_capacity())}; }
  __MH_INLINE const_iterator begin() const thread { return {this, 0}; }
  __MH_INLINE const_iterator end() const thread { return {this, int(get_capacity())}; }
  __MH_INLINE auto get_multidimensional_index(iterator at) const thread {
    return get_multidimensional_index(at.__slot);
  }
  // Of a tensor's element, the one here that goes with it: of its row in a reduction of rows, of its column in one of
  // columns, at its own place otherwise. This thread must have it: is_iterator_compatible.
  template <typename Other>
  __MH_INLINE iterator map_iterator(__cooperative_iterator<Other> at) thread {
    return {this, __map(at)};
  }
  template <typename Other>
  __MH_INLINE const_iterator map_iterator(__cooperative_iterator<Other> at) const thread {
    return {this, __map(at)};
  }
  template <typename Other>
  __MH_INLINE int __map(__cooperative_iterator<Other> at) const thread {
    typedef typename __mh::plain<Other>::layout From;
    static_assert(From::columns == Layout::columns && From::rows == Layout::rows && !From::reduction,
                  "map_iterator: the iterator's tensor has another shape");
    int element = at.__tensor->__placement.element(at.__slot);
    if (element < 0) return 0;
    int slot = __placement.find(Layout::role == __mh::ROWS      ? element / Layout::columns
                                : Layout::role == __mh::COLUMNS ? element % Layout::columns
                                                                : element);
    if (slot >= 0) return slot;
    __mh_tensor_fault(__MH_FAULT_INCOMPATIBLE);
    return 0;
  }

  // All elements from a tensor in memory, whose dimensions of size 1 serve for all; 0 beyond its dynamic extents.
  template <typename Element, typename TensorExtents, typename... Tags>
  __MH_INLINE void load(const tensor<Element, TensorExtents, tensor_inline, Tags...>& from) thread {
    __check_memory<tensor<Element, TensorExtents, tensor_inline, Tags...>, true>();
    for (int i = 0; i < Layout::slots; ++i) {
      long at[2];
      if (i >= __placement.capacity() || !__locate(i, at)) continue;
      for (uint r = 0; r < get_rank(); ++r)
        if (from.get_extent(r) == 1) at[r] = 0;
      __elements[i] = ElementType(0);
      if (!__mh::has(from, at)) continue;
      __MH_TENSOR_LOAD(ElementType value = from.__at(at);)
      __elements[i] = value;
    }
  }
  // All elements to a tensor in memory; those beyond its dynamic extents are dropped.
  template <typename Element, typename TensorExtents, typename... Tags>
  __MH_INLINE void store(thread tensor<Element, TensorExtents, tensor_inline, Tags...>& to) const thread {
    __check_memory<tensor<Element, TensorExtents, tensor_inline, Tags...>, false>();
    for (int i = 0; i < Layout::slots; ++i) {
      long at[2];
      if (i >= __placement.capacity() || !__locate(i, at) || !__mh::has(to, at)) continue;
      ElementType value = __elements[i];
      __MH_TENSOR_STORE(to.__at(at) = value;)
    }
  }
  __MH_INLINE bool __locate(int slot, thread long* at) const thread {
    int element = __placement.element(slot);
    at[0] = Layout::reduction ? element : element % Layout::columns, at[1] = element / Layout::columns;
    return element >= 0;
  }
  template <typename Tensor, bool broadcast>
  static constexpr void __check_memory() {
    static_assert(Tensor::get_rank() == Extents::rank(), "the tensor has another number of dimensions");
    static_assert(is_same_v<typename Tensor::value_type, ElementType>, "the tensor's elements have another type");
    static_assert((__covers<Tensor, broadcast>(0) && __covers<Tensor, broadcast>(Extents::rank() - 1)),
                  "the tensor's static extents are smaller than the cooperative tensor's");
  }
  template <typename Tensor, bool broadcast>
  static constexpr bool __covers(uint r) {
    return Tensor::get_static_extent(r) >= Extents::static_extent(r) ||
           (broadcast && Tensor::get_static_extent(r) == 1);
  }

  template <typename Other, typename OtherLayout>
  __MH_INLINE void __copy_slots(const thread cooperative_tensor<ElementType, Other, OtherLayout>& from) thread {
    if (!__placement.same(from.__placement)) __mh_tensor_fault(__MH_FAULT_INCOMPATIBLE);
    int capacity = __placement.capacity(), given = from.__placement.capacity();
    for (int i = 0; i < Layout::slots && i < OtherLayout::slots; ++i)
      if (i < capacity && i < given) __elements[i] = from.__elements[i];
  }
};

}  // namespace metal
