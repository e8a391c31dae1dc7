// <metal_integer>.
#pragma once

#define __MH_EACH_INTEGER(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)
#define __MH_INT_VECTOR1(name)                                     \
  template <typename E, int N>                                     \
  inline __mh::ext<__mh::integral<E>, N> name(__mh::ext<E, N> x) { \
    __mh::ext<E, N> r;                                             \
    for (int i = 0; i < N; ++i) r[i] = name(E(x[i]));              \
    return r;                                                      \
  }
#define __MH_INT_VECTOR2(name)                                                                      \
  template <typename E, int N>                                                                      \
  inline __mh::ext<__mh::integral<E>, N> name(__mh::ext<E, N> x, __mh::same_t<__mh::ext<E, N>> y) { \
    __mh::ext<E, N> r;                                                                              \
    for (int i = 0; i < N; ++i) r[i] = name(E(x[i]), E(y[i]));                                      \
    return r;                                                                                       \
  }                                                                                                 \
  template <typename S, typename E, int N>                                                          \
  inline __mh::ext<__mh::scalar_with<S, __mh::integral<E>>, N> name(S x, __mh::ext<E, N> y) {       \
    return name(__mh::ext<E, N>(E(x)), y);                                                          \
  }
#define __MH_INT_VECTOR3(name)                                                                    \
  template <typename E, int N>                                                                    \
  inline __mh::ext<__mh::integral<E>, N> name(__mh::ext<E, N> x, __mh::same_t<__mh::ext<E, N>> y, \
                                              __mh::same_t<__mh::ext<E, N>> z) {                  \
    __mh::ext<E, N> r;                                                                            \
    for (int i = 0; i < N; ++i) r[i] = name(E(x[i]), E(y[i]), E(z[i]));                           \
    return r;                                                                                     \
  }

namespace metal {

#define __MH_INTEGER(T)                                                                                        \
  inline T max(T x, T y) { return x > y ? x : y; }                                                             \
  inline T min(T x, T y) { return x < y ? x : y; }                                                             \
  inline T max3(T x, T y, T z) { return max(x, max(y, z)); }                                                   \
  inline T min3(T x, T y, T z) { return min(x, min(y, z)); }                                                   \
  inline T median3(T x, T y, T z) { return max(min(x, y), min(max(x, y), z)); }                                \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }                                        \
  inline T abs(T x) { return is_signed<T>::value && x < T(0) ? T(-x) : x; }                                    \
  inline make_unsigned_t<T> absdiff(T x, T y) {                                                                \
    typedef make_unsigned_t<T> U;                                                                              \
    return x > y ? U(U(x) - U(y)) : U(U(y) - U(x));                                                            \
  }                                                                                                            \
  inline T addsat(T x, T y) {                                                                                  \
    T r;                                                                                                       \
    return __builtin_add_overflow(x, y, &r)                                                                    \
               ? (is_signed<T>::value && x < T(0) ? numeric_limits<T>::lowest() : numeric_limits<T>::max())    \
               : r;                                                                                            \
  }                                                                                                            \
  inline T subsat(T x, T y) {                                                                                  \
    T r;                                                                                                       \
    return __builtin_sub_overflow(x, y, &r)                                                                    \
               ? (!is_signed<T>::value || x < T(0) ? numeric_limits<T>::lowest() : numeric_limits<T>::max())   \
               : r;                                                                                            \
  }                                                                                                            \
  inline T hadd(T x, T y) { return T((x >> 1) + (y >> 1) + (x & y & T(1))); }                                  \
  inline T rhadd(T x, T y) { return T((x >> 1) + (y >> 1) + ((x | y) & T(1))); }                               \
  inline T clz(T x) {                                                                                          \
    return x ? T(__builtin_clzl(ulong(make_unsigned_t<T>(x))) - (64 - 8 * int(sizeof(T)))) : T(8 * sizeof(T)); \
  }                                                                                                            \
  inline T ctz(T x) { return x ? T(__builtin_ctzl(ulong(make_unsigned_t<T>(x)))) : T(8 * sizeof(T)); }         \
  inline T popcount(T x) { return T(__builtin_popcountl(ulong(make_unsigned_t<T>(x)))); }                      \
  inline T reverse_bits(T x) {                                                                                 \
    make_unsigned_t<T> r = 0, v = make_unsigned_t<T>(x);                                                       \
    for (int i = 0; i < 8 * int(sizeof(T)); ++i) r = make_unsigned_t<T>(r << 1 | (v >> i & 1));                \
    return T(r);                                                                                               \
  }                                                                                                            \
  inline T rotate(T x, T n) {                                                                                  \
    const uint bits = 8 * sizeof(T), k = uint(n) & (bits - 1);                                                 \
    make_unsigned_t<T> v = make_unsigned_t<T>(x);                                                              \
    return k ? T(make_unsigned_t<T>(v << k) | make_unsigned_t<T>(v >> (bits - k))) : x;                        \
  }                                                                                                            \
  inline T extract_bits(T x, uint offset, uint bits) {                                                         \
    if (!bits) return 0;                                                                                       \
    const uint width = 8 * sizeof(T);                                                                          \
    return T(T(make_unsigned_t<T>(x) << (width - offset - bits)) >> (width - bits));                           \
  }                                                                                                            \
  inline T insert_bits(T base, T insert, uint offset, uint bits) {                                             \
    typedef make_unsigned_t<T> U;                                                                              \
    if (!bits) return base;                                                                                    \
    U mask = U(U(U(~U(0)) >> (8 * sizeof(T) - bits)) << offset);                                               \
    return T((U(base) & U(~mask)) | (U(U(insert) << offset) & mask));                                          \
  }
__MH_EACH_INTEGER(__MH_INTEGER)
#undef __MH_INTEGER

#define __MH_MULHI(T, Wide) \
  inline T mulhi(T x, T y) { return T(Wide(x) * Wide(y) >> 8 * sizeof(T)); }
__MH_MULHI(char, int)
__MH_MULHI(uchar, uint)
__MH_MULHI(short, int)
__MH_MULHI(ushort, uint)
__MH_MULHI(int, long)
__MH_MULHI(uint, ulong)
#undef __MH_MULHI
inline ulong mulhi(ulong x, ulong y) {
  ulong a = x >> 32, b = x & 0xffffffffu, c = y >> 32, d = y & 0xffffffffu, low = b * d, m = a * d + (low >> 32),
        n = b * c + (m & 0xffffffffu);
  return a * c + (m >> 32) + (n >> 32);
}
inline long mulhi(long x, long y) { return long(mulhi(ulong(x), ulong(y))) - (x < 0 ? y : 0) - (y < 0 ? x : 0); }
#define __MH_MADHI(T) \
  inline T madhi(T x, T y, T z) { return T(mulhi(x, y) + z); }
__MH_EACH_INTEGER(__MH_MADHI)
#undef __MH_MADHI
#define __MH_MADSAT(T, Wide)                                                                   \
  inline T madsat(T x, T y, T z) {                                                             \
    Wide r = Wide(x) * Wide(y) + Wide(z);                                                      \
    return r > Wide(numeric_limits<T>::max())                                                  \
               ? numeric_limits<T>::max()                                                      \
               : (r < Wide(numeric_limits<T>::lowest()) ? numeric_limits<T>::lowest() : T(r)); \
  }
__MH_MADSAT(char, int)
__MH_MADSAT(uchar, int)
__MH_MADSAT(short, int)
__MH_MADSAT(ushort, long)
__MH_MADSAT(int, long)
__MH_MADSAT(uint, ulong)
#undef __MH_MADSAT
inline int mul24(int x, int y) { return (x << 8 >> 8) * (y << 8 >> 8); }
inline uint mul24(uint x, uint y) { return (x & 0xffffffu) * (y & 0xffffffu); }
inline int mad24(int x, int y, int z) { return mul24(x, y) + z; }
inline uint mad24(uint x, uint y, uint z) { return mul24(x, y) + z; }

__MH_INT_VECTOR1(abs)
__MH_INT_VECTOR1(clz)
__MH_INT_VECTOR1(ctz) __MH_INT_VECTOR1(popcount) __MH_INT_VECTOR1(reverse_bits) __MH_INT_VECTOR2(max)
    __MH_INT_VECTOR2(min) __MH_INT_VECTOR2(addsat) __MH_INT_VECTOR2(subsat) __MH_INT_VECTOR2(hadd)
        __MH_INT_VECTOR2(rhadd) __MH_INT_VECTOR2(rotate) __MH_INT_VECTOR2(mulhi) __MH_INT_VECTOR3(max3)
            __MH_INT_VECTOR3(min3) __MH_INT_VECTOR3(median3) __MH_INT_VECTOR3(clamp)
#undef __MH_INT_VECTOR1
#undef __MH_INT_VECTOR2
#undef __MH_INT_VECTOR3
#undef __MH_EACH_INTEGER

}  // namespace metal
