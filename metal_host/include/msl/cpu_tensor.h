// Cooperative tensors on the CPU: runtime/tensor.c knows the layouts and computes for all threads of a scope at once. Each
// brings its elements as words.
#pragma once

extern "C" {
struct __mh_tensor_request_t {
  ulong layouts[3];
  thread uint* words[3];
  uint reduce, accumulate, integer, identity;
};
ulong __mh_tensor_layout(ulong key);
uint __mh_tensor_capacity(ulong layout);
uint __mh_tensor_element(ulong layout, uint slot);
uint __mh_tensor_same(ulong layout, ulong other);
void __mh_tensor_operation(const thread __mh_tensor_request_t* request, uint threads) __attribute__((convergent));
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
  __MH_INLINE void check(int slot) const thread {
#ifdef __MH_INSTRUMENTED
    __mh_check_slot(layout, slot);
#endif
  }
};

// Elements as the runtime computes with them: float, or int32 where the destination's are.
template <bool integer, typename T>
inline uint word_of(T value) {
  if constexpr (integer)
    return uint(int(value));
  else
    return __builtin_bit_cast(uint, float(value));
}
template <typename T, bool integer>
inline T of_word(uint word) {
  if constexpr (integer)
    return T(int(word));
  else
    return T(__builtin_bit_cast(float, word));
}

// An operand of a product as this thread's words.
template <typename Operand, bool integer>
struct operand_words;
template <typename T, typename Extents, typename Layout, bool integer>
struct operand_words<metal::cooperative_tensor<T, Extents, Layout>, integer> {
  uint words[Layout::slots];
  ulong layout;
  // relaxed: a float may lose all but 10 bits of its fraction.
  __MH_INLINE void load(const thread metal::cooperative_tensor<T, Extents, Layout>& from, bool relaxed) thread {
    layout = from.__placement.layout;
    for (int i = 0; i < Layout::slots; ++i) {
      words[i] = word_of<integer>(from.__elements[i]);
      if (relaxed && metal::is_same_v<T, float>) words[i] &= 0xffffe000u;
    }
  }
  __MH_INLINE void store(thread metal::cooperative_tensor<T, Extents, Layout>& to) const thread {
    int capacity = to.__placement.capacity();
    for (int i = 0; i < capacity; ++i) to.__elements[i] = of_word<T, integer>(words[i]);
  }
};

template <typename Shape, typename Left, typename Right, typename Destination>
__MH_INLINE void multiply(thread Left& left, thread Right& right, thread Destination& destination) {
  constexpr bool integer = metal::is_same_v<typename Destination::element_type, int>;
  operand_words<Left, integer> a;
  operand_words<Right, integer> b;
  operand_words<Destination, integer> c;
  a.load(left, Shape::relaxed);
  b.load(right, Shape::relaxed);
  c.load(destination, false);
  __mh_tensor_request_t request = {
      {a.layout, b.layout, c.layout}, {a.words, b.words, c.words}, 0, Shape::accumulate, integer, 0};
  __mh_tensor_operation(&request, Shape::threads);
  c.store(destination);
}

}  // namespace __mh
