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
typedef char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong uintptr_t;
typedef long intptr_t;
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

// Between vectors of one length. From bfloat to half and back clang's back end needs float between.
template <typename To, typename From, int N>
struct converter {
  static constexpr ext<To, N> of(ext<From, N> v) { return __builtin_convertvector(v, ext<To, N>); }
};
template <typename T, int N>
struct converter<T, T, N> {
  static constexpr ext<T, N> of(ext<T, N> v) { return v; }
};
template <int N>
struct converter<half, bfloat, N> {
  static constexpr ext<half, N> of(ext<bfloat, N> v) {
    return converter<half, float, N>::of(converter<float, bfloat, N>::of(v));
  }
};
template <int N>
struct converter<bfloat, half, N> {
  static constexpr ext<bfloat, N> of(ext<half, N> v) {
    return converter<bfloat, float, N>::of(converter<float, half, N>::of(v));
  }
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
  template <typename... B, typename = typename enable_if<sizeof...(B) + 1 == N && (N > 1)>::type>
  bool_vector(bool a, B... b) {
    bool all[] = {a, bool(b)...};
    for (int i = 0; i < N; ++i) (&this->x)[i] = all[i];
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

template <typename T>
struct vector_element_of {
  typedef T type;
};
template <>
struct vector_element_of<bool> {
  typedef uchar type;
};
template <typename T>
using vector_element = typename vector_element_of<T>::type;

template <typename T, int N>
using vec_t = typename vec_of<T, N>::type;

template <typename T, int N>
struct packed;
template <typename A, typename V>
struct from_scalar {
  typedef V type;
};
template <typename F, int N, typename V>
struct from_scalar<ext<F, N>, V> {};
template <typename A, typename V>
using scalar_to = typename from_scalar<A, V>::type;

// __mh_make<T>(...) is what the front end makes of T(...), (T)x and static_cast<T>(x) where T may be a vector type.
template <typename T>
struct maker {
  template <typename... A>
  static constexpr T of(A... a) {
    return T(a...);
  }
};
template <>
struct maker<bfloat> {  // clang wants float between the two
  template <typename A>
  static constexpr bfloat of(A a) {
    return bfloat(a);
  }
  static constexpr bfloat of(half a) { return bfloat(float(a)); }
};
template <>
struct maker<half> {
  template <typename A>
  static constexpr half of(A a) {
    return half(a);
  }
  static constexpr half of(bfloat a) { return half(float(a)); }
};
template <typename E>
struct maker<ext<E, 2>> {
  typedef ext<E, 2> V;
  template <typename A>
  static constexpr scalar_to<A, V> of(A a) {
    return V(maker<E>::of(a));
  }
  template <typename A, typename B>
  static constexpr V of(A a, B b) {
    return V{E(a), E(b)};
  }
  template <typename F>
  static constexpr V of(ext<F, 2> v) {
    return converter<E, F, 2>::of(v);
  }
  template <typename F>
  static constexpr V of(packed<F, 2> v) {
    return converter<E, F, 2>::of(v.unpacked());
  }
  static constexpr V of(bool_vector<2> v) { return V{E(v.x), E(v.y)}; }
};
template <typename E>
struct maker<ext<E, 3>> {
  typedef ext<E, 3> V;
  template <typename A>
  static constexpr scalar_to<A, V> of(A a) {
    return V(maker<E>::of(a));
  }
  template <typename A, typename B, typename C>
  static constexpr V of(A a, B b, C c) {
    return V{E(a), E(b), E(c)};
  }
  template <typename F>
  static constexpr V of(ext<F, 3> v) {
    return converter<E, F, 3>::of(v);
  }
  template <typename F>
  static constexpr V of(packed<F, 3> v) {
    return converter<E, F, 3>::of(v.unpacked());
  }
  static constexpr V of(bool_vector<3> v) { return V{E(v.x), E(v.y), E(v.z)}; }
  template <typename C>
  static constexpr V of(ext<E, 2> v, C c) {
    return V{v.x, v.y, E(c)};
  }
  template <typename A>
  static constexpr V of(A a, ext<E, 2> v) {
    return V{E(a), v.x, v.y};
  }
};
template <typename E>
struct maker<ext<E, 4>> {
  typedef ext<E, 4> V;
  template <typename A>
  static constexpr scalar_to<A, V> of(A a) {
    return V(maker<E>::of(a));
  }
  template <typename A, typename B, typename C, typename D>
  static constexpr V of(A a, B b, C c, D d) {
    return V{E(a), E(b), E(c), E(d)};
  }
  template <typename F>
  static constexpr V of(ext<F, 4> v) {
    return converter<E, F, 4>::of(v);
  }
  template <typename F>
  static constexpr V of(packed<F, 4> v) {
    return converter<E, F, 4>::of(v.unpacked());
  }
  static constexpr V of(bool_vector<4> v) { return V{E(v.x), E(v.y), E(v.z), E(v.w)}; }
  static constexpr V of(ext<E, 2> v, ext<E, 2> w) { return V{v.x, v.y, w.x, w.y}; }
  template <typename C, typename D>
  static constexpr V of(ext<E, 2> v, C c, D d) {
    return V{v.x, v.y, E(c), E(d)};
  }
  template <typename A, typename D>
  static constexpr V of(A a, ext<E, 2> v, D d) {
    return V{E(a), v.x, v.y, E(d)};
  }
  template <typename A, typename B>
  static constexpr V of(A a, B b, ext<E, 2> v) {
    return V{E(a), E(b), v.x, v.y};
  }
  template <typename D>
  static constexpr V of(ext<E, 3> v, D d) {
    return V{v.x, v.y, v.z, E(d)};
  }
  template <typename A>
  static constexpr V of(A a, ext<E, 3> v) {
    return V{E(a), v.x, v.y, v.z};
  }
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

// What it makes of `T name = {x, y}`, where there may be fewer values than elements: the other elements are 0. Vectors are as in T(...).
namespace __mh {
template <typename... A>
struct all_scalars {
  static constant constexpr bool value = true;
};
template <typename F, int N, typename... A>
struct all_scalars<ext<F, N>, A...> {
  static constant constexpr bool value = false;
};
template <typename F, typename... A>
struct all_scalars<F, A...> : all_scalars<A...> {};
template <typename V, bool scalars>
struct list {
  template <typename... A>
  static constexpr V of(A... a) {
    return maker<V>::of(a...);
  }
};
template <typename E>
struct list<ext<E, 2>, true> {
  static constexpr ext<E, 2> of(E a, E b = 0) { return ext<E, 2>{a, b}; }
};
template <typename E>
struct list<ext<E, 3>, true> {
  static constexpr ext<E, 3> of(E a, E b = 0, E c = 0) { return ext<E, 3>{a, b, c}; }
};
template <typename E>
struct list<ext<E, 4>, true> {
  static constexpr ext<E, 4> of(E a, E b = 0, E c = 0, E d = 0) { return ext<E, 4>{a, b, c, d}; }
};
}  // namespace __mh
template <typename V, typename... A>
constexpr V __mh_list(A... a) {
  return __mh::list<V, __mh::all_scalars<A...>::value>::of(a...);
}

// f({a, b, c}): what a vector parameter takes.
namespace __mh {
template <typename... A>
struct braces;
template <typename A, typename B>
struct braces<A, B> {
  A a;
  B b;
  template <typename E>
  constexpr operator ext<E, 2>() const {
    return ext<E, 2>{E(a), E(b)};
  }
};
template <typename A, typename B, typename C>
struct braces<A, B, C> {
  A a;
  B b;
  C c;
  template <typename E>
  constexpr operator ext<E, 3>() const {
    return ext<E, 3>{E(a), E(b), E(c)};
  }
};
template <typename A, typename B, typename C, typename D>
struct braces<A, B, C, D> {
  A a;
  B b;
  C c;
  D d;
  template <typename E>
  constexpr operator ext<E, 4>() const {
    return ext<E, 4>{E(a), E(b), E(c), E(d)};
  }
};
}  // namespace __mh
template <typename... A>
constexpr __mh::braces<A...> __mh_braces(A... a) {
  return __mh::braces<A...>{a...};
}

// The scalar beside a vector, where it is wider than the vector's elements.
namespace __mh {
template <typename T>
struct element_of {
  template <typename S>
  static constexpr S of(S x) {
    return x;
  }
};
template <typename E, int N>
struct element_of<ext<E, N>> {
  template <typename S>
  static constexpr E of(S x) {
    return E(x);
  }
};
#define __MH_QUALIFIED(qualified) \
  template <typename T>           \
  struct element_of<qualified> : element_of<T> {};
__MH_QUALIFIED(const T)
__MH_QUALIFIED(T&)
__MH_QUALIFIED(thread T)
__MH_QUALIFIED(device T)
__MH_QUALIFIED(constant T)
__MH_QUALIFIED(threadgroup T)
__MH_QUALIFIED(const thread T)
__MH_QUALIFIED(const device T)
__MH_QUALIFIED(const threadgroup T)
__MH_QUALIFIED(const constant T)
#undef __MH_QUALIFIED
}  // namespace __mh
// A side of a conditional expression, read from its memory.
template <typename T>
constexpr T __mh_value(T x) {
  return x;
}
template <typename V, typename S>
constexpr auto __mh_demote(S x) {
  return __mh::element_of<V>::of(x);
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
