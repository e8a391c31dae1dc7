// <metal_math>, <metal_common>, <metal_geometric>, <metal_relational>.
//
// Every function has overloads for float and half and their vectors, computed in float and rounded once. Metal has none
// for bfloat, which converts to float: sources may define their own.
// Further arguments of a vector function may be scalars, as Metal's implicit conversion has it. __mh_f::name(float...)
// is the back end's (cpu.h, nvptx.h).
#pragma once

namespace __mh {

template <typename T>
struct same {
  typedef T type;
};
template <typename T>
using same_t = typename same<T>::type;  // not deduced: lets a scalar become a vector

template <typename S, typename T>
using scalar_with = typename enable_if<metal::is_scalar<S>::value, T>::type;
template <typename T>
using floating = typename enable_if<metal::is_floating_point<T>::value, T>::type;
template <typename T>
using from_bfloat = typename enable_if<metal::is_same<T, bfloat>::value, float>::type;
template <typename T>
using integral = typename enable_if<metal::is_integral<T>::value, T>::type;

}  // namespace __mh

#define __MH_EACH_FLOAT(M, ...) M(float, __VA_ARGS__) M(half, __VA_ARGS__)

#define __MH_SCALAR1(T, name, f) \
  inline T name(T x) { return T(f(float(x))); }
#define __MH_SCALAR2(T, name, f) \
  inline T name(T x, T y) { return T(f(float(x), float(y))); }
#define __MH_SCALAR3(T, name, f) \
  inline T name(T x, T y, T z) { return T(f(float(x), float(y), float(z))); }
#define __MH_VECTOR1(name)                                                               \
  template <typename E, int N>                                                           \
  inline __mh::ext<__mh::floating<E>, N> name(__mh::ext<E, N> x) {                       \
    __mh::ext<E, N> r;                                                                   \
    _Pragma("clang loop unroll(full)") for (int i = 0; i < N; ++i) r[i] = name(E(x[i])); \
    return r;                                                                            \
  }
#define __MH_VECTOR2(name)                                                                          \
  template <typename E, int N>                                                                      \
  inline __mh::ext<__mh::floating<E>, N> name(__mh::ext<E, N> x, __mh::same_t<__mh::ext<E, N>> y) { \
    __mh::ext<E, N> r;                                                                              \
    _Pragma("clang loop unroll(full)") for (int i = 0; i < N; ++i) r[i] = name(E(x[i]), E(y[i]));   \
    return r;                                                                                       \
  }                                                                                                 \
  template <typename S, typename E, int N>                                                          \
  inline __mh::ext<__mh::scalar_with<S, __mh::floating<E>>, N> name(S x, __mh::ext<E, N> y) {       \
    return name(__mh::ext<E, N>(E(x)), y);                                                          \
  }
#define __MH_VECTOR3(name)                                                                                 \
  template <typename E, int N>                                                                             \
  inline __mh::ext<__mh::floating<E>, N> name(__mh::ext<E, N> x, __mh::same_t<__mh::ext<E, N>> y,          \
                                              __mh::same_t<__mh::ext<E, N>> z) {                           \
    __mh::ext<E, N> r;                                                                                     \
    _Pragma("clang loop unroll(full)") for (int i = 0; i < N; ++i) r[i] = name(E(x[i]), E(y[i]), E(z[i])); \
    return r;                                                                                              \
  }
#define __MH_MATH1(name)                                \
  __MH_EACH_FLOAT(__MH_SCALAR1, name, __mh_f::name)     \
  template <typename B>                                  \
  inline __mh::from_bfloat<B> name(B x) {           \
    return __mh_f::name(float(x));                          \
  }                                                      \
  __MH_VECTOR1(name)
#define __MH_MATH2(name)                                \
  __MH_EACH_FLOAT(__MH_SCALAR2, name, __mh_f::name)     \
  template <typename B>                                  \
  inline __mh::from_bfloat<B> name(B x, B y) {           \
    return __mh_f::name(float(x), float(y));                          \
  }                                                      \
  __MH_VECTOR2(name)
#define __MH_MATH3(name)                                \
  __MH_EACH_FLOAT(__MH_SCALAR3, name, __mh_f::name)     \
  template <typename B>                                  \
  inline __mh::from_bfloat<B> name(B x, B y, B z) {           \
    return __mh_f::name(float(x), float(y), float(z));                          \
  }                                                      \
  __MH_VECTOR3(name)

namespace __mh_f {  // what both back ends share

inline float exp10(float x) { return exp2(3.32192809488736234787f * x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline float ceil(float x) { return __builtin_ceilf(x); }
inline float floor(float x) { return __builtin_floorf(x); }
inline float trunc(float x) { return __builtin_truncf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline float round(float x) {
  float t = __builtin_truncf(x);
  return __builtin_copysignf(__builtin_fabsf(x - t) >= 0.5f ? t + __builtin_copysignf(1.0f, x) : t, x);
}
inline float fract(float x) {
  float r = x - __builtin_floorf(x);
  return r < 0x1.fffffep-1f ? r : 0x1.fffffep-1f;
}
inline float divide(float x, float y) { return x / y; }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float fdim(float x, float y) { return x > y ? x - y : (x <= y ? 0.0f : x + y); }
inline float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
inline float fmin(float x, float y) { return __builtin_fminf(x, y); }
inline float max(float x, float y) { return __builtin_fmaxf(x, y); }
inline float min(float x, float y) { return __builtin_fminf(x, y); }
inline float max3(float x, float y, float z) { return max(x, max(y, z)); }
inline float min3(float x, float y, float z) { return min(x, min(y, z)); }
inline float median3(float x, float y, float z) { return max(min(x, y), min(max(x, y), z)); }
inline float fmax3(float x, float y, float z) { return max3(x, y, z); }
inline float fmin3(float x, float y, float z) { return min3(x, y, z); }
inline float fmedian3(float x, float y, float z) { return median3(x, y, z); }
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
inline float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
inline float mix(float x, float y, float a) { return x + (y - x) * a; }
inline float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
inline float smoothstep(float low, float high, float x) {
  float t = saturate((x - low) / (high - low));
  return t * t * (3.0f - 2.0f * t);
}
inline float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : (x == 0.0f ? x : 0.0f)); }
inline float powr(float x, float y) { return pow(x, y); }
inline float nextafter(float x, float y) {
  if (x != x || y != y) return x + y;
  if (x == y) return y;
  uint bits = __builtin_bit_cast(uint, x);
  bits = x == 0.0f ? (y > 0.0f ? 1u : 0x80000001u) : (x < y) == (x > 0.0f) ? bits + 1 : bits - 1;
  return __builtin_bit_cast(float, bits);
}
inline float sinpi(float x) { return sin(3.14159265358979323846f * (x - 2.0f * rint(0.5f * x))); }
inline float cospi(float x) { return cos(3.14159265358979323846f * (x - 2.0f * rint(0.5f * x))); }
inline float tanpi(float x) { return sinpi(x) / cospi(x); }

}  // namespace __mh_f

namespace metal {

__MH_MATH1(acos)
__MH_MATH1(acosh)
__MH_MATH1(asin) __MH_MATH1(asinh) __MH_MATH1(atan) __MH_MATH1(atanh) __MH_MATH1(cos) __MH_MATH1(cosh) __MH_MATH1(cospi)
    __MH_MATH1(sin) __MH_MATH1(sinh) __MH_MATH1(sinpi) __MH_MATH1(tan) __MH_MATH1(tanh) __MH_MATH1(tanpi)
        __MH_MATH1(exp) __MH_MATH1(exp2) __MH_MATH1(exp10) __MH_MATH1(log) __MH_MATH1(log2) __MH_MATH1(log10)
            __MH_MATH1(sqrt) __MH_MATH1(rsqrt) __MH_MATH1(abs) __MH_MATH1(fabs) __MH_MATH1(ceil) __MH_MATH1(floor)
                __MH_MATH1(trunc) __MH_MATH1(rint) __MH_MATH1(round) __MH_MATH1(fract) __MH_MATH1(sign)
                    __MH_MATH1(saturate) __MH_MATH2(atan2) __MH_MATH2(pow) __MH_MATH2(powr) __MH_MATH2(fmod)
                        __MH_MATH2(copysign) __MH_MATH2(divide) __MH_MATH2(fdim) __MH_MATH2(fmax) __MH_MATH2(fmin)
                            __MH_MATH2(max) __MH_MATH2(min) __MH_MATH2(step) __MH_MATH3(fma) __MH_MATH3(max3) __MH_MATH3(min3)
                                __MH_MATH3(median3) __MH_MATH3(fmax3) __MH_MATH3(fmin3) __MH_MATH3(fmedian3)
                                    __MH_MATH3(clamp) __MH_MATH3(mix) __MH_MATH3(smoothstep)
#define __MH_SPLITTING(T, _)                                                         \
  inline T sincos(T x, thread T& cosine) {                                           \
    cosine = cos(x);                                                                 \
    return sin(x);                                                                   \
  }                                                                                  \
  inline T modf(T x, thread T& whole) {                                              \
    whole = trunc(x);                                                                \
    return copysign(isinf(x) ? T(0) : T(x - whole), x);                              \
  }                                                                                  \
  inline T ldexp(T x, int exponent) { return T(__mh_f::ldexp(float(x), exponent)); } \
  inline T frexp(T x, thread int& exponent) {                                        \
    float f = float(x);                                                              \
    exponent = 0;                                                                    \
    if (f == 0.0f || !isfinite(x)) return x;                                         \
    if (__builtin_fabsf(f) < 0x1p-126f) f *= 0x1p64f, exponent = -64;                \
    uint bits = as_type<uint>(f);                                                    \
    exponent += int(bits >> 23 & 255) - 126;                                         \
    return T(as_type<float>((bits & 0x807fffffu) | 0x3f000000u));                    \
  }                                                                                  \
  inline int ilogb(T x) {                                                            \
    int exponent;                                                                    \
    frexp(x, exponent);                                                              \
    return exponent - 1;                                                             \
  }

inline float nextafter(float x, float y) { return __mh_f::nextafter(x, y); }

// Relational. The bits, not comparisons: the answer must not depend on the compiler's math mode.
#define __MH_CLASSIFY(T, _)                                                                    \
  inline bool isnan(T x) { return (as_type<uint>(float(x)) & 0x7fffffffu) > 0x7f800000u; }     \
  inline bool isinf(T x) { return (as_type<uint>(float(x)) & 0x7fffffffu) == 0x7f800000u; }    \
  inline bool isfinite(T x) { return (as_type<uint>(float(x)) & 0x7f800000u) != 0x7f800000u; } \
  inline bool isnormal(T x) { return isfinite(x) && !(fabs(x) < numeric_limits<T>::min()); }   \
  inline bool signbit(T x) { return as_type<uint>(float(x)) >> 31; }                           \
  inline bool isordered(T x, T y) { return !isnan(x) && !isnan(y); }                           \
  inline bool isunordered(T x, T y) { return isnan(x) || isnan(y); }
                                        __MH_EACH_FLOAT(__MH_CLASSIFY, _) __MH_CLASSIFY(bfloat, _) __MH_EACH_FLOAT(__MH_SPLITTING, _)
#undef __MH_CLASSIFY
#undef __MH_SPLITTING
#define __MH_CLASSIFY_VECTOR(name)                                                                                   \
  template <typename E, int N>                                                                                       \
  inline __mh::vec_t<typename __mh::enable_if<is_floating_point<E>::value, bool>::type, N> name(__mh::ext<E, N> x) { \
    __mh::ext<int, N> r;                                                                                             \
    for (int i = 0; i < N; ++i) r[i] = name(E(x[i]));                                                                \
    return r;                                                                                                        \
  }
                                            __MH_CLASSIFY_VECTOR(isnan) __MH_CLASSIFY_VECTOR(isinf)
                                                __MH_CLASSIFY_VECTOR(isfinite) __MH_CLASSIFY_VECTOR(isnormal)
                                                    __MH_CLASSIFY_VECTOR(signbit)
#undef __MH_CLASSIFY_VECTOR

                                                        template <typename T>
                                                        inline typename __mh::enable_if<is_scalar<T>::value, T>::type
    select(T a, T b, bool c) {
  return c ? b : a;
}
#define __MH_VECTOR_LOGIC(N)                                                                     \
  template <typename E>                                                                          \
  inline __mh::ext<E, N> select(__mh::ext<E, N> a, __mh::same_t<__mh::ext<E, N>> b, bool##N c) { \
    for (int i = 0; i < N; ++i) a[i] = c[i] ? E(b[i]) : E(a[i]);                                 \
    return a;                                                                                    \
  }                                                                                              \
  inline bool any(bool##N v) {                                                                   \
    bool r = false;                                                                              \
    for (int i = 0; i < N; ++i) r = r || v[i];                                                   \
    return r;                                                                                    \
  }                                                                                              \
  inline bool all(bool##N v) {                                                                   \
    bool r = true;                                                                               \
    for (int i = 0; i < N; ++i) r = r && v[i];                                                   \
    return r;                                                                                    \
  }                                                                                              \
  template <typename E>                                                                          \
  inline bool any(__mh::ext<E, N> v) {                                                           \
    return any(bool##N(v));                                                                      \
  }                                                                                              \
  template <typename E>                                                                          \
  inline bool all(__mh::ext<E, N> v) {                                                           \
    return all(bool##N(v));                                                                      \
  }
__MH_VECTOR_LOGIC(2)
__MH_VECTOR_LOGIC(3)
__MH_VECTOR_LOGIC(4)
#undef __MH_VECTOR_LOGIC

// Geometric.
template <typename E, int N>
inline __mh::floating<E> dot(__mh::ext<E, N> a, __mh::ext<E, N> b) {
  E sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}
template <typename E, int N>
inline __mh::floating<E> length_squared(__mh::ext<E, N> a) {
  return dot(a, a);
}
template <typename E, int N>
inline __mh::floating<E> length(__mh::ext<E, N> a) {
  return sqrt(dot(a, a));
}
template <typename E, int N>
inline __mh::floating<E> distance(__mh::ext<E, N> a, __mh::ext<E, N> b) {
  return length(a - b);
}
template <typename E, int N>
inline __mh::floating<E> distance_squared(__mh::ext<E, N> a, __mh::ext<E, N> b) {
  return length_squared(a - b);
}
template <typename E, int N>
inline __mh::ext<__mh::floating<E>, N> normalize(__mh::ext<E, N> a) {
  return a * rsqrt(dot(a, a));
}
template <typename E>
inline __mh::ext<__mh::floating<E>, 3> cross(__mh::ext<E, 3> a, __mh::ext<E, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}

// fast:: is what Metal computes with relaxed rounding; here both name the same function on the CPU.
#define __MH_MODE1(name)                                    \
  inline float name(float x) { return __MH_MODE(name)(x); } \
  __MH_VECTOR1(name)
#define __MH_MODE2(name)                                                \
  inline float name(float x, float y) { return __MH_MODE(name)(x, y); } \
  __MH_VECTOR2(name)
#define __MH_MODES                                                                                               \
  __MH_MODE1(acos)                                                                                               \
  __MH_MODE1(acosh)                                                                                              \
  __MH_MODE1(asin) __MH_MODE1(asinh) __MH_MODE1(atan) __MH_MODE1(atanh) __MH_MODE1(ceil) __MH_MODE1(cos)         \
      __MH_MODE1(cosh) __MH_MODE1(cospi) __MH_MODE1(exp) __MH_MODE1(exp2) __MH_MODE1(exp10) __MH_MODE1(fabs)     \
          __MH_MODE1(abs) __MH_MODE1(floor) __MH_MODE1(fract) __MH_MODE1(log) __MH_MODE1(log2) __MH_MODE1(log10) \
              __MH_MODE1(rint) __MH_MODE1(round) __MH_MODE1(rsqrt) __MH_MODE1(saturate) __MH_MODE1(sin)          \
                  __MH_MODE1(sinh) __MH_MODE1(sinpi) __MH_MODE1(sqrt) __MH_MODE1(tan) __MH_MODE1(tanh)           \
                      __MH_MODE1(tanpi) __MH_MODE1(trunc) __MH_MODE2(atan2) __MH_MODE2(divide) __MH_MODE2(fmax)  \
                          __MH_MODE2(fmin) __MH_MODE2(fmod) __MH_MODE2(max) __MH_MODE2(min) __MH_MODE2(pow)      \
                              __MH_MODE2(powr) inline float                                                      \
                              sincos(float x, thread float& cosine) {                                            \
    cosine = cos(x);                                                                                             \
    return sin(x);                                                                                               \
  }
namespace precise {
#define __MH_MODE(name) __mh_f::name
__MH_MODES
#undef __MH_MODE
}  // namespace precise
namespace fast {
#define __MH_MODE(name) __mh_fast::name
__MH_MODES
#undef __MH_MODE
}  // namespace fast
#undef __MH_MODES

}  // namespace metal
#undef __MH_MATH1
#undef __MH_MATH2
#undef __MH_MATH3
