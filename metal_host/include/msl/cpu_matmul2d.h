// Operations on cooperative tensors, on the CPU: every thread of the scope brings its elements as words, and the last
// one makes runtime/tensor.c compute for all.
#pragma once

extern "C" {
struct __mh_tensor_request_t {
  ulong layouts[3];
  thread uint* words[3];
  uint reduce, accumulate, integer, identity;
};
uint __mh_tensor_memory_accumulates();
void __mh_tensor_operation(const thread __mh_tensor_request_t* request, uint threads) __attribute__((convergent));
}

namespace __mh {

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

// An operand of a product as this thread's words. Of one in memory it is a part of `k` along the inner dimension.
// relaxed: a float may lose all but 10 bits of its fraction.
template <typename Operand, typename Shape, int role, int k, bool integer>
struct operand_words;
template <typename T, typename Extents, typename Layout, typename Shape, int role, int k, bool integer>
struct operand_words<metal::cooperative_tensor<T, Extents, Layout>, Shape, role, k, integer> {
  uint words[Layout::slots];
  ulong layout;
  typedef metal::cooperative_tensor<T, Extents, Layout> Tensor;
  __MH_INLINE void load(const thread Tensor& from, bool relaxed, long, long) thread {
    layout = from.__placement.layout;
    for (int i = 0; i < Layout::slots; ++i) {
      words[i] = word_of<integer>(from.__elements[i]);
      if (relaxed && metal::is_same_v<T, float>) words[i] &= 0xffffe000u;
    }
  }
  __MH_INLINE void store(thread Tensor& to) const thread {
    int capacity = to.__placement.capacity();
    for (int i = 0; i < capacity; ++i) to.__elements[i] = of_word<T, integer>(words[i]);
  }
};
template <typename Element, typename Extents, typename... Tags, typename Shape, int role, int k, bool integer>
struct operand_words<metal::tensor<Element, Extents, metal::tensor_inline, Tags...>, Shape, role, k, integer> {
  typedef metal::tensor<Element, Extents, metal::tensor_inline, Tags...> Tensor;
  typedef typename Tensor::value_type T;
  typedef tensor_layout<LINEAR, Shape::columns(role, k), Shape::rows(role, k), Shape::transposed(role),
                        Shape::threads, 0>
      Layout;
  uint words[Layout::slots];
  ulong layout;
  operand_words() : layout(__mh_tensor_layout(Layout::key)) {}
  // From first_k to inner - 1 at most along the inner dimension; what is outside the tensor is 0.
  __MH_INLINE void load(const thread Tensor& from, bool relaxed, long first_k, long inner) thread {
    constexpr int inner_axis = role == LEFT ? Shape::transpose_left : role == RIGHT ? !Shape::transpose_right : 2;
    for (int i = 0; i < Layout::slots; ++i) {
      words[i] = 0;
      int element = int(__mh_tensor_element(layout, uint(i)));
      if (element < 0) continue;
      long at[3] = {element % Layout::columns, element / Layout::columns, 0};
      at[inner_axis] += first_k;
      if ((inner_axis < 2 && at[inner_axis] >= inner) || !has(from, at)) continue;
      T value;
      if constexpr (role == DESTINATION) {  // the same threads store there: no barrier is needed between
        __MH_TENSOR_STORE(value = from.__at(at);)
      } else {
        __MH_TENSOR_LOAD(value = from.__at(at);)
      }
      words[i] = word_of<integer>(value);
      if (relaxed && metal::is_same_v<T, float>) words[i] &= 0xffffe000u;
    }
  }
  __MH_INLINE void store(const thread Tensor& to) const thread {
    for (int i = 0; i < Layout::slots; ++i) {
      int element = int(__mh_tensor_element(layout, uint(i)));
      long at[2] = {element % Layout::columns, element / Layout::columns};
      T value = of_word<T, integer>(words[i]);
      if (element < 0 || !has(to, at)) continue;
      __MH_TENSOR_STORE(to.__at(at) = value;)
    }
  }
};

template <typename Shape, typename Left, typename Right, typename Destination>
__MH_INLINE void multiply(thread Left& left, thread Right& right, thread Destination& destination) {
  constexpr bool integer = metal::is_same_v<typename Destination::value_type, int>;
  constexpr bool in_memory = operand_traits<Left>::memory && operand_traits<Right>::memory;
  constexpr int k = in_memory && (Shape::dynamic || Shape::k > 32) ? 32 : Shape::k;
  long inner = inner_size<Shape>(left, right);
  operand_words<Left, Shape, LEFT, k, integer> a;
  operand_words<Right, Shape, RIGHT, k, integer> b;
  operand_words<Destination, Shape, DESTINATION, k, integer> c;
  bool add = Shape::accumulate || (operand_traits<Destination>::memory && __mh_tensor_memory_accumulates());
  if (add || !operand_traits<Destination>::memory) c.load(destination, false, 0, 0);
  for (long first_k = 0; first_k == 0 || first_k < inner; first_k += k) {
    a.load(left, Shape::relaxed, first_k, inner);
    b.load(right, Shape::relaxed, first_k, inner);
    __mh_tensor_request_t request = {
        {a.layout, b.layout, c.layout}, {a.words, b.words, c.words}, 0, add || first_k, integer, 0};
    __mh_tensor_operation(&request, Shape::threads);
  }
  c.store(destination);
}

// operation: runtime.h's enum mh_reduce.
template <typename Source, typename Destination, typename T>
__MH_INLINE void reduce(const thread Source& source, thread Destination& destination, uint operation, T identity) {
  constexpr bool integer = metal::is_same_v<T, int>;
  uint from[Source::layout::slots], to[Destination::layout::slots];
  for (int i = 0; i < Source::layout::slots; ++i) from[i] = word_of<integer>(source.__elements[i]);
  __mh_tensor_request_t request = {{source.__placement.layout, 0, destination.__placement.layout},
                                   {from, nullptr, to},
                                   operation,
                                   0,
                                   integer,
                                   word_of<integer>(identity)};
  __mh_tensor_operation(&request, 32);
  int capacity = destination.__placement.capacity();
  for (int i = 0; i < capacity; ++i) destination.__elements[i] = of_word<T, integer>(to[i]);
}

}  // namespace __mh
