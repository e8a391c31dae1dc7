// <metal_cooperative_tensor>: tensors whose elements are dealt out to the threads of a scope. The back end says which
// element a thread's slot holds (__mh::placement): on the CPU a parameter of the launch.
#pragma once

namespace metal {
template <typename ElementType, typename Extents, typename Layout>
struct cooperative_tensor;
}

namespace __mh {

enum role { LEFT, RIGHT, DESTINATION, ROWS, COLUMNS, LINEAR };  // runtime/tensor.c

// columns x rows elements, as they are stored: the first index of an element is its column. Of a reduction's result the
// columns and rows are those of the tensor that is reduced. `salt`: what else a layout may depend on.
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
  static_assert(columns < 1 << 14 && rows < 1 << 14 && columns * rows <= 1 << 16, "the tensor is too large");
  static constexpr ulong key =
      ulong(role) | ulong(transposed) << 3 | ulong(columns) << 4 | ulong(rows) << 18 | ulong(threads) << 32 | salt_ << 43;
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

}  // namespace __mh

#ifdef __NVPTX__
#include "nvptx_tensor.h"
#else
#include "cpu_tensor.h"
#endif

namespace metal {

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

  template <typename Other, typename OtherLayout>
  __MH_INLINE void __copy_slots(const thread cooperative_tensor<ElementType, Other, OtherLayout>& from) thread {
    if (!__placement.same(from.__placement)) __mh_tensor_fault(__MH_FAULT_INCOMPATIBLE);
    int capacity = __placement.capacity(), given = from.__placement.capacity();
    for (int i = 0; i < Layout::slots && i < OtherLayout::slots; ++i)
      if (i < capacity && i < given) __elements[i] = from.__elements[i];
  }
};

}  // namespace metal
