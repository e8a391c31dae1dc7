// Names of Apple's private library, as sources use them under `#pragma METAL internals : enable`: MLX defines its bfloat
// functions by them. The last argument chooses fast or precise arithmetic.
#pragma once

enum { __METAL_MAYBE_FAST_MATH__, __METAL_FAST_MATH__, __METAL_PRECISE_MATH__ };

#define __MH_MATH1(name)                                      \
  template <typename... Mode>                                 \
  inline float __metal_##name(float x, Mode...) {             \
    return __mh_f::name(x);                                   \
  }
#define __MH_MATH2(name)                                      \
  template <typename... Mode>                                 \
  inline float __metal_##name(float x, float y, Mode...) {    \
    return __mh_f::name(x, y);                                \
  }
#define __MH_MATH3(name)                                            \
  template <typename... Mode>                                       \
  inline float __metal_##name(float x, float y, float z, Mode...) { \
    return __mh_f::name(x, y, z);                                   \
  }
__MH_MATH1(fabs)
__MH_MATH1(acos)
__MH_MATH1(acosh)
__MH_MATH1(asin)
__MH_MATH1(asinh)
__MH_MATH1(atan)
__MH_MATH1(atanh)
__MH_MATH1(ceil)
__MH_MATH1(cos)
__MH_MATH1(cosh)
__MH_MATH1(cospi)
__MH_MATH1(exp)
__MH_MATH1(exp2)
__MH_MATH1(exp10)
__MH_MATH1(floor)
__MH_MATH1(fract)
__MH_MATH1(log)
__MH_MATH1(log2)
__MH_MATH1(log10)
__MH_MATH1(rint)
__MH_MATH1(round)
__MH_MATH1(rsqrt)
__MH_MATH1(sin)
__MH_MATH1(sinh)
__MH_MATH1(sinpi)
__MH_MATH1(sqrt)
__MH_MATH1(tan)
__MH_MATH1(tanh)
__MH_MATH1(tanpi)
__MH_MATH1(trunc)
__MH_MATH2(atan2)
__MH_MATH2(divide)
__MH_MATH2(fmax)
__MH_MATH2(fmin)
__MH_MATH2(fmod)
__MH_MATH2(nextafter)
__MH_MATH2(pow)
__MH_MATH2(powr)
__MH_MATH3(fma)
__MH_MATH3(fmax3)
__MH_MATH3(fmin3)
__MH_MATH3(fmedian3)
#undef __MH_MATH1
#undef __MH_MATH2
#undef __MH_MATH3
template <typename... Mode>
inline float __metal_ldexp(float x, int exponent, Mode...) {
  return __mh_f::ldexp(x, exponent);
}
template <typename... Mode>
inline float __metal_frexp(float x, thread int* exponent, Mode...) {
  return metal::frexp(x, *exponent);
}

#define __MH_SIMD(name)                                                            \
  template <typename T, typename... A>                                             \
  inline __attribute__((always_inline, convergent)) T __metal_##name(T x, A... a) { \
    return metal::name(x, a...);                                                   \
  }
__MH_SIMD(simd_shuffle)
__MH_SIMD(simd_broadcast)
__MH_SIMD(simd_shuffle_up)
__MH_SIMD(simd_shuffle_down)
__MH_SIMD(simd_shuffle_xor)
__MH_SIMD(simd_shuffle_rotate_up)
__MH_SIMD(simd_shuffle_rotate_down)
__MH_SIMD(simd_sum)
__MH_SIMD(simd_product)
__MH_SIMD(simd_max)
__MH_SIMD(simd_min)
__MH_SIMD(simd_prefix_inclusive_sum)
__MH_SIMD(simd_prefix_inclusive_product)
__MH_SIMD(simd_prefix_exclusive_sum)
__MH_SIMD(simd_prefix_exclusive_product)
#undef __MH_SIMD
inline __attribute__((always_inline, convergent)) float __metal_simd_xor(float x) {
  return as_type<float>(metal::simd_xor(as_type<uint>(x)));
}
template <typename T>
inline __attribute__((always_inline, convergent)) T __metal_simd_shuffle_and_fill_up(T data, T filling, ushort delta,
                                                                                    ushort modulo) {
  return metal::simd_shuffle_and_fill_up(data, filling, delta, modulo);
}
template <typename T>
inline __attribute__((always_inline, convergent)) T __metal_simd_shuffle_and_fill_down(T data, T filling, ushort delta,
                                                                                      ushort modulo) {
  return metal::simd_shuffle_and_fill_down(data, filling, delta, modulo);
}
inline ushort __metal_get_simdgroup_size(ushort) { return 32; }
inline ushort __metal_get_thread_index_in_simdgroup(ushort) { return ushort(__mh_lane()); }
