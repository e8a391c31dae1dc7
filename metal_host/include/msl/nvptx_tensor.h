// Where elements are, on NVIDIA GPUs: the layout "apple10", whatever the launch says. See runtime/tensor.c.
#pragma once

namespace __mh {

template <typename Layout>
struct placement {
  static constexpr int fragments = Layout::across * Layout::down, simdgroups = (Layout::threads + 31) / 32,
                       per_simdgroup = (fragments + simdgroups - 1) / simdgroups;
  static __MH_DEVICE int down() {  // of a 16x16 fragment, the first of a lane's two rows
    uint lane = __mh_lane();
    return int((lane >> 2 & 4) | (lane >> 1 & 3));
  }
  static __MH_DEVICE int right() {  // the first of its four columns
    uint lane = __mh_lane();
    return int(((lane >> 2 & 2) | (lane & 1)) * 4);
  }
  static __MH_DEVICE int first_fragment() {
    return simdgroups == 1 ? 0 : int(__nvvm_read_ptx_sreg_tid_x() / 32) * per_simdgroup;
  }

  __MH_DEVICE int capacity() const thread { return Layout::slots; }
  __MH_DEVICE int element(int slot) const thread {
    int row = 0, column = 0;
    if constexpr (Layout::threads == 1) {
      return slot;
    } else if constexpr (Layout::role == ROWS) {
      row = slot / 2 * 16 + down() + slot % 2 * 8;
      return row < Layout::rows ? row : -1;
    } else if constexpr (Layout::role == COLUMNS) {
      column = slot / 4 * 16 + right() + slot % 4;
      return column < Layout::columns ? column : -1;
    } else {
      int fragment = first_fragment() + slot / 8;
      row = fragment / Layout::across * 16 + down() + slot / 4 % 2 * 8;
      column = fragment % Layout::across * 16 + right() + slot % 4;
      return row < Layout::rows && column < Layout::columns ? row * Layout::columns + column : -1;
    }
  }
  __MH_DEVICE int find(int element) const thread {
    if constexpr (Layout::role == ROWS) return element / 16 * 2 + element / 8 % 2;
    if constexpr (Layout::role == COLUMNS) return element / 16 * 4 + element % 4;
    for (int slot = 0; slot < Layout::slots; ++slot)
      if (this->element(slot) == element) return slot;
    return -1;
  }
  template <typename Other>
  __MH_DEVICE bool same(placement<Other>) const thread {
    return Layout::rows == Other::rows && Layout::columns == Other::columns && Layout::threads == Other::threads;
  }
  template <typename Other>
  __MH_DEVICE bool maps_to(placement<Other>) const thread {
    return Layout::rows == Other::rows && Layout::columns == Other::columns && Layout::threads == Other::threads;
  }
  __MH_DEVICE void check(int) const thread {}
};

}  // namespace __mh
