// <metal_atomic>: int, uint, bool and float in device memory, all but float in threadgroup memory; relaxed order only.
// Of ulong there are the minimum and the maximum in device memory, which return nothing.
// The back end defines __mh::atomic_update(pointer, operation, operand), which returns the old value.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };
// Orders of a fence only: a type of their own, so that no other function takes them.
enum __mh_fence_order { memory_order_acquire, memory_order_release, memory_order_acq_rel, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

template <typename T>
struct atomic {
  T __value;
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, bool> || is_same_v<T, float> ||
                    is_same_v<T, ulong>,
                "Metal has atomics of int, uint, bool, float and ulong");
  atomic() = default;
  atomic(const thread atomic&) = delete;
};
// OpenCL reserves Metal's names for these; the front end renames them.
typedef atomic<int> __mh_atomic_int;
typedef atomic<uint> __mh_atomic_uint;
typedef atomic<bool> __mh_atomic_bool;
typedef atomic<float> __mh_atomic_float;
typedef atomic<ulong> __mh_atomic_ulong;

}  // namespace metal

namespace __mh {

struct exchange {
  template <typename T>
  static T of(T, T operand) {
    return operand;
  }
};
struct subtract {
  template <typename T>
  static T of(T a, T b) {
    return a - b;
  }
};

}  // namespace __mh

namespace metal {

#define __MH_ATOMIC_UPDATE(space, name, operation, allowed)                                   \
  template <typename T>                                                                       \
  inline typename __mh::enable_if<allowed, T>::type atomic_##name##_explicit(                 \
      volatile space atomic<T>* object, typename __mh::same<T>::type operand, memory_order) { \
    return __mh::atomic_update<__mh::operation>((space T*)&object->__value, operand);         \
  }
#define __MH_IS_INTEGER (is_same_v<T, int> || is_same_v<T, uint>)
#define __MH_ATOMICS(space, has_float)                                                                      \
  template <typename T>                                                                                     \
  inline typename __mh::enable_if<!is_same_v<T, ulong>, T>::type atomic_load_explicit(const volatile space atomic<T>* object, memory_order) {                     \
    return __mh::atomic_load((space T*)&object->__value);                                                   \
  }                                                                                                         \
  template <typename T>                                                                                     \
  inline void atomic_store_explicit(volatile space atomic<T>* object, typename __mh::same<T>::type desired, \
                                    memory_order) {                                                         \
    __mh::atomic_store((space T*)&object->__value, desired);                                                \
  }                                                                                                         \
  template <typename T>                                                                                     \
  inline bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object, thread T* expected,   \
                                                    typename __mh::same<T>::type desired, memory_order,     \
                                                    memory_order) {                                         \
    return __mh::atomic_compare_exchange((space T*)&object->__value, expected, desired);                    \
  }                                                                                                         \
  __MH_ATOMIC_UPDATE(space, exchange, exchange, true)                                                       \
  __MH_ATOMIC_UPDATE(space, fetch_add, add, __MH_IS_INTEGER || (has_float && is_same_v<T, float>))          \
  __MH_ATOMIC_UPDATE(space, fetch_sub, subtract, __MH_IS_INTEGER || (has_float && is_same_v<T, float>))     \
  __MH_ATOMIC_UPDATE(space, fetch_max, maximum, __MH_IS_INTEGER)                                            \
  __MH_ATOMIC_UPDATE(space, fetch_min, minimum, __MH_IS_INTEGER)                                            \
  __MH_ATOMIC_UPDATE(space, fetch_and, bit_and, __MH_IS_INTEGER)                                            \
  __MH_ATOMIC_UPDATE(space, fetch_or, bit_or, __MH_IS_INTEGER)                                              \
  __MH_ATOMIC_UPDATE(space, fetch_xor, bit_xor, __MH_IS_INTEGER)
__MH_ATOMICS(device, true)
__MH_ATOMICS(threadgroup, false)
#undef __MH_ATOMICS
#undef __MH_ATOMIC_UPDATE
#undef __MH_IS_INTEGER

inline void atomic_max_explicit(volatile device atomic<ulong>* object, ulong operand, memory_order) {
  __mh::atomic_update<__mh::maximum>((device ulong*)&object->__value, operand);
}
inline void atomic_min_explicit(volatile device atomic<ulong>* object, ulong operand, memory_order) {
  __mh::atomic_update<__mh::minimum>((device ulong*)&object->__value, operand);
}

// One operating-system thread runs a launch: there is nothing to order.
inline void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope::thread_scope_device) {}
inline void atomic_thread_fence(mem_flags, __mh_fence_order, thread_scope = thread_scope::thread_scope_device) {}

}  // namespace metal
