// What the CPU runtime gives the library (runtime/). The counterpart for NVIDIA GPUs is nvptx.h.
#pragma once

extern "C" {
struct __mh_self_t {
  uint lane, thread_index;
};
extern device __mh_self_t __mh_self;
void __mh_threadgroup_barrier(uint flags) __attribute__((convergent));
void __mh_simdgroup_barrier(uint flags) __attribute__((convergent));
void __mh_shuffle(const thread void* in, thread void* out, uint size, uint lane) __attribute__((convergent));
uint __mh_gather(const thread void* in, thread void* out, uint size) __attribute__((convergent));
uint __mh_vote(uint value, thread uint* active) __attribute__((convergent));
void __mh_matrix_product(const thread float* operands, thread float* result) __attribute__((convergent));
uint __mh_identifier(uint which, uint axis);
ulong __mh_argument(uint index);
ulong __mh_threadgroup_argument(uint index);
#ifdef __MH_INSTRUMENTED
void __mh_count_transcendental();
void __mh_atomic_access(uint on);
void __mh_matrix_access(uint kind);
uint __mh_lane_index();
void __mh_check_slot(ulong layout, uint slot);
void __mh_report_tensor(uint fault);
#endif
}

// Of runtime/runtime.h.
#define __MH_FAULT_EXTENTS 11
#define __MH_FAULT_INCOMPATIBLE 12

// How a kernel gets what it was launched with.
struct __mh_context_t {
  ulong argument(uint index) const thread { return __mh_argument(index); }
  ulong threadgroup_argument(uint index) const thread { return __mh_threadgroup_argument(index); }
  uint identifier(uint which, uint axis) const thread { return __mh_identifier(which, axis); }
};
#define __MH_ENTRY(symbol, call, limit)                                            \
  extern "C" {                                                                     \
  __attribute__((visibility("default"))) void symbol() {                           \
    __mh_context_t context;                                                        \
    __MH_UNPACK call(context);                                                     \
  }                                                                                \
  __attribute__((visibility("default"))) device uint symbol##_max_threads = limit; \
  }

#ifdef __MH_INSTRUMENTED
#define __mh_tensor_fault(fault) __mh_report_tensor(fault)
#define __MH_TRANSCENDENTAL __mh_count_transcendental(),
#define __MH_ATOMIC(statement) \
  __mh_atomic_access(1);       \
  statement;                   \
  __mh_atomic_access(0);
#define __MH_MATRIX_LOAD(statement) \
  __mh_matrix_access(1);            \
  statement __mh_matrix_access(0);
#define __MH_MATRIX_STORE(statement) \
  __mh_matrix_access(2);             \
  statement __mh_matrix_access(0);
#define __MH_TENSOR_LOAD(statement) \
  __mh_matrix_access(3);            \
  statement __mh_matrix_access(0);
#define __MH_TENSOR_STORE(statement) \
  __mh_matrix_access(4);             \
  statement __mh_matrix_access(0);
#else
#define __mh_tensor_fault(fault)
#define __MH_TRANSCENDENTAL
#define __MH_ATOMIC(statement) statement;
#define __MH_MATRIX_LOAD(statement) statement
#define __MH_MATRIX_STORE(statement) statement
#define __MH_TENSOR_LOAD(statement) statement
#define __MH_TENSOR_STORE(statement) statement
#endif

inline __attribute__((always_inline)) uint __mh_lane() {
#ifdef __MH_INSTRUMENTED
  return __mh_lane_index();
#else
  return __mh_self.lane;
#endif
}

// The C library's functions, under names that no Metal source can mean.
#ifdef __APPLE__
#define __MH_C_NAME(name) "_" #name
#else
#define __MH_C_NAME(name) #name
#endif
#define __MH_LIBM(name)                                                       \
  extern "C" float __mh_c_##name(float) __asm__(__MH_C_NAME(name##f));        \
  namespace __mh_f {                                                          \
  inline float name(float x) { return __MH_TRANSCENDENTAL __mh_c_##name(x); } \
  }
__MH_LIBM(acos)
__MH_LIBM(acosh)
__MH_LIBM(asin) __MH_LIBM(asinh) __MH_LIBM(atan) __MH_LIBM(atanh) __MH_LIBM(cos) __MH_LIBM(cosh) __MH_LIBM(sin)
    __MH_LIBM(sinh) __MH_LIBM(tan) __MH_LIBM(tanh) __MH_LIBM(exp) __MH_LIBM(exp2) __MH_LIBM(log) __MH_LIBM(log2)
        __MH_LIBM(log10)
#undef __MH_LIBM
            extern "C" float __mh_c_atan2(float, float) __asm__(__MH_C_NAME(atan2f));
extern "C" float __mh_c_pow(float, float) __asm__(__MH_C_NAME(powf));
extern "C" float __mh_c_fmod(float, float) __asm__(__MH_C_NAME(fmodf));
extern "C" float __mh_c_ldexp(float, int) __asm__(__MH_C_NAME(ldexpf));

namespace __mh_f {
inline float atan2(float y, float x) { return __MH_TRANSCENDENTAL __mh_c_atan2(y, x); }
inline float pow(float x, float y) { return __MH_TRANSCENDENTAL __mh_c_pow(x, y); }
inline float fmod(float x, float y) { return __mh_c_fmod(x, y); }
inline float ldexp(float x, int e) { return __mh_c_ldexp(x, e); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
}  // namespace __mh_f
namespace __mh_fast = __mh_f;

namespace __mh {

template <typename T>
inline __attribute__((always_inline, convergent)) T from_lane(T value, uint lane) {
  T result;
  __mh_shuffle(&value, &result, sizeof(T), lane);
  return result;
}

inline __attribute__((always_inline, convergent)) uint vote(bool value, thread uint& active) {
  return __mh_vote(value, &active);
}

template <typename Op, typename T>
inline __attribute__((always_inline, convergent)) T reduce(T value) {
  T all[32];
  uint active = __mh_gather(&value, all, sizeof(T));
  T result = all[__builtin_ctz(active)];
  for (uint rest = active & (active - 1); rest; rest &= rest - 1) result = Op::of(result, T(all[__builtin_ctz(rest)]));
  return result;
}

template <typename Op, bool inclusive, typename T>
inline __attribute__((always_inline, convergent)) T prefix(T value, T identity) {
  T all[32];
  uint active = __mh_gather(&value, all, sizeof(T));
  active &= (inclusive ? 2u << __mh_lane() : 1u << __mh_lane()) - 1u;
  T result = identity;
  for (uint rest = active; rest; rest &= rest - 1) result = Op::of(result, T(all[__builtin_ctz(rest)]));
  return result;
}

// d = a b + c for one 8x8 fragment of each, in float; every lane brings and gets two neighbours of a row.
template <typename T>
inline __attribute__((always_inline, convergent)) ext<float, 2> matrix_product(ext<T, 2> a, ext<T, 2> b,
                                                                               ext<float, 2> c) {
  float operands[6] = {float(a.x), float(a.y), float(b.x), float(b.y), c.x, c.y}, result[2];
  __mh_matrix_product(operands, result);
  return ext<float, 2>{result[0], result[1]};
}

// Threadgroup variables. Each is a global of its own between two margins; its record tells the host address, size and
// number.
#ifdef __MH_INSTRUMENTED
constexpr uint margin = 4096;
#else
constexpr uint margin = 0;
#endif
#ifdef __APPLE__
#define __MH_RECORDS "__DATA,mh_tg"
#else
#define __MH_RECORDS "mh_tg"
#endif
template <typename Tag, typename T>
struct threadgroup_variable {
  static device char storage[margin + sizeof(T) + margin];
  static device ulong record[4];  // 32 bytes: the section must hold no padding
  static inline __attribute__((always_inline)) threadgroup T* get() {
    (void)&record;
    return (threadgroup T*)(ulong)&storage[margin];
  }
};
template <typename Tag, typename T>
__attribute__((aligned(128))) device char threadgroup_variable<Tag, T>::storage[margin + sizeof(T) + margin];
template <typename Tag, typename T>
__attribute__((section(__MH_RECORDS), used)) device ulong threadgroup_variable<Tag, T>::record[4] = {
    (ulong)&threadgroup_variable<Tag, T>::storage + margin, sizeof(T), Tag::number, 0};

}  // namespace __mh

// One operating-system thread runs all fibers, so a plain access is atomic; the instrumented build must know that it is
// meant so.
namespace __mh {
template <typename Op, typename P, typename T>
inline T atomic_update(P pointer, T operand) {
  __MH_ATOMIC(T old = *pointer; *pointer = Op::of(old, operand))
  return old;
}
template <typename P>
inline auto atomic_load(P pointer) {
  __MH_ATOMIC(auto value = *pointer)
  return value;
}
template <typename P, typename T>
inline void atomic_store(P pointer, T value) {
  __MH_ATOMIC(*pointer = value)
}
template <typename P, typename T>
inline bool atomic_compare_exchange(P pointer, thread T* expected, T desired) {
  __MH_ATOMIC(T old = *pointer; if (old == *expected)* pointer = desired)
  bool same = old == *expected;
  *expected = old;
  return same;
}
}  // namespace __mh
