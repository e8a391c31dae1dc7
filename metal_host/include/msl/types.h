// Address spaces, scalar and vector types, vector constructors, as_type.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define thread __private

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

constexpr float __mh_infinity() { return __builtin_inff(); }
constexpr float __mh_nan() { return __builtin_nanf(""); }

namespace __mh {

template <typename T, int N>
using ext = T __attribute__((ext_vector_type(N)));

template <bool, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};

// OpenCL has no vectors of bool; a comparison of vectors gives a vector of integers, 0 or -1, which converts to this.
template <int N>
struct bool_elements;
template <>
struct bool_elements<2> {
  bool x, y;
};
template <>
struct bool_elements<3> {
  bool x, y, z, padding;
};
template <>
struct bool_elements<4> {
  bool x, y, z, w;
};
template <int N>
struct bool_vector : bool_elements<N> {
  bool_vector() = default;
  bool_vector(bool value) {
    for (int i = 0; i < N; ++i) (&this->x)[i] = value;
  }
  template <typename E>
  bool_vector(ext<E, N> v) {
    for (int i = 0; i < N; ++i) (&this->x)[i] = v[i] != 0;
  }
  thread bool& operator[](int i) thread { return (&this->x)[i]; }
  const thread bool& operator[](int i) const thread { return (&this->x)[i]; }
  friend bool_vector operator!(bool_vector a) {
    for (int i = 0; i < N; ++i) a[i] = !a[i];
    return a;
  }
  friend bool_vector operator&&(bool_vector a, bool_vector b) {
    for (int i = 0; i < N; ++i) a[i] = a[i] && b[i];
    return a;
  }
  friend bool_vector operator||(bool_vector a, bool_vector b) {
    for (int i = 0; i < N; ++i) a[i] = a[i] || b[i];
    return a;
  }
};

template <typename T, int N>
struct vec_of {
  typedef ext<T, N> type;
};
template <int N>
struct vec_of<bool, N> {
  typedef bool_vector<N> type;
};

template <typename T, int N>
using vec_t = typename vec_of<T, N>::type;

// __mh_make<T>(...) is what the front end makes of the functional notation T(...) for vector types.
template <typename T>
struct maker {
  template <typename... A>
  static constexpr T of(A... a) {
    return T(a...);
  }
};
template <typename E>
struct maker<ext<E, 2>> {
  typedef ext<E, 2> V;
  static constexpr V of(E a) { return V{a, a}; }
  static constexpr V of(E a, E b) { return V{a, b}; }
  template <typename F>
  static constexpr V of(ext<F, 2> v) {
    return __builtin_convertvector(v, V);
  }
};
template <typename E>
struct maker<ext<E, 3>> {
  typedef ext<E, 3> V;
  static constexpr V of(E a) { return V{a, a, a}; }
  static constexpr V of(E a, E b, E c) { return V{a, b, c}; }
  template <typename F>
  static constexpr V of(ext<F, 3> v) {
    return __builtin_convertvector(v, V);
  }
  static constexpr V of(ext<E, 2> v, E c) { return V{v.x, v.y, c}; }
  static constexpr V of(E a, ext<E, 2> v) { return V{a, v.x, v.y}; }
};
template <typename E>
struct maker<ext<E, 4>> {
  typedef ext<E, 4> V;
  static constexpr V of(E a) { return V{a, a, a, a}; }
  static constexpr V of(E a, E b, E c, E d) { return V{a, b, c, d}; }
  template <typename F>
  static constexpr V of(ext<F, 4> v) {
    return __builtin_convertvector(v, V);
  }
  static constexpr V of(ext<E, 2> v, ext<E, 2> w) { return V{v.x, v.y, w.x, w.y}; }
  static constexpr V of(ext<E, 2> v, E c, E d) { return V{v.x, v.y, c, d}; }
  static constexpr V of(E a, ext<E, 2> v, E d) { return V{a, v.x, v.y, d}; }
  static constexpr V of(E a, E b, ext<E, 2> v) { return V{a, b, v.x, v.y}; }
  static constexpr V of(ext<E, 3> v, E d) { return V{v.x, v.y, v.z, d}; }
  static constexpr V of(E a, ext<E, 3> v) { return V{a, v.x, v.y, v.z}; }
};
template <int N>
struct maker<bool_vector<N>> {
  template <typename A>
  static bool_vector<N> of(A a) {
    return bool_vector<N>(a);
  }
  template <typename A, typename B, typename... C>
  static bool_vector<N> of(A a, B b, C... c) {
    static_assert(2 + sizeof...(C) == N, "a bool vector needs one value for each element");
    return bool_vector<N>(ext<int, N>{int(bool(a)), int(bool(b)), int(bool(c))...});
  }
};

}  // namespace __mh

template <typename T, typename... A>
constexpr T __mh_make(A... a) {
  return __mh::maker<T>::of(a...);
}

#define __MH_VECTORS(T)                               \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
__MH_VECTORS(char)
__MH_VECTORS(uchar)
__MH_VECTORS(short)
__MH_VECTORS(ushort)
__MH_VECTORS(int)
__MH_VECTORS(uint)
__MH_VECTORS(long)
__MH_VECTORS(ulong)
__MH_VECTORS(half)
__MH_VECTORS(bfloat)
__MH_VECTORS(float)
#undef __MH_VECTORS
typedef __mh::bool_vector<2> bool2;
typedef __mh::bool_vector<3> bool3;
typedef __mh::bool_vector<4> bool4;

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));  // the front end takes __mh::vec_t where T may be bool

}  // namespace metal

// A by-value parameter: __builtin_bit_cast of a vector's element would read element 0.
template <typename To, typename From>
constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, value);
}
