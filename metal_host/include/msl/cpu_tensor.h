// Where elements are, on the CPU: runtime/tensor.c knows the layouts.
#pragma once

extern "C" {
ulong __mh_tensor_layout(ulong key);
uint __mh_tensor_capacity(ulong layout);
uint __mh_tensor_element(ulong layout, uint slot);
uint __mh_tensor_same(ulong layout, ulong other);
uint __mh_tensor_find(ulong layout, uint element);
uint __mh_tensor_maps(ulong from, ulong to);
}

namespace __mh {

template <typename Layout>
struct placement {
  ulong layout;
  placement() : layout(__mh_tensor_layout(Layout::key)) {}
  __MH_INLINE int capacity() const thread { return int(__mh_tensor_capacity(layout)); }
  __MH_INLINE int element(int slot) const thread { return int(__mh_tensor_element(layout, uint(slot))); }
  template <typename Other>
  __MH_INLINE bool same(placement<Other> other) const thread {
    return __mh_tensor_same(layout, other.layout);
  }
  // The slot of this thread that has an element, or -1.
  __MH_INLINE int find(int element) const thread { return int(__mh_tensor_find(layout, uint(element))); }
  // Has every thread a slot of `other` for each element that it has here?
  template <typename Other>
  __MH_INLINE bool maps_to(placement<Other> other) const thread {
    return __mh_tensor_maps(layout, other.layout);
  }
  __MH_INLINE void check(int slot) const thread {
#ifdef __MH_INSTRUMENTED
    __mh_check_slot(layout, slot);
#endif
  }
};

}  // namespace __mh
