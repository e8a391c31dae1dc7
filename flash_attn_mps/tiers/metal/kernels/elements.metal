// Loads and stores of neighbouring elements of a row.

// N neighbouring elements, N a power of two, in as few accesses as hold them. Codes (codes.metal) are loaded as elements.
#if KV_FORMAT
#define ELEMENTS_OF_CODES(N) \
  METAL_FUNC static void load(thread T* to, device const uchar* from) { Codes<N>::load(to, from); }
#else
#define ELEMENTS_OF_CODES(N)
#endif
#define ELEMENTS_IN_HALVES(SPACE)                                        \
  METAL_FUNC static void load(thread T* to, SPACE const T* from) {       \
    Elements<N / 2>::load(to, from);                                     \
    Elements<N / 2>::load(to + N / 2, from + N / 2);                     \
  }                                                                      \
  METAL_FUNC static void store(SPACE T* to, thread const T* from) {      \
    Elements<N / 2>::store(to, from);                                    \
    Elements<N / 2>::store(to + N / 2, from + N / 2);                    \
  }
#define ELEMENTS_1(SPACE)                                                                    \
  METAL_FUNC static void load(thread T* to, SPACE const T* from) { to[0] = from[0]; }        \
  METAL_FUNC static void store(SPACE T* to, thread const T* from) { to[0] = from[0]; }
#define ELEMENTS_2(SPACE)                                            \
  METAL_FUNC static void load(thread T* to, SPACE const T* from) {   \
    vec<T, 2> x = *(SPACE const vec<T, 2>*)from;                     \
    to[0] = x.x, to[1] = x.y;                                        \
  }                                                                  \
  METAL_FUNC static void store(SPACE T* to, thread const T* from) {  \
    *(SPACE vec<T, 2>*)to = vec<T, 2>(from[0], from[1]);             \
  }
#define ELEMENTS_4(SPACE)                                                    \
  METAL_FUNC static void load(thread T* to, SPACE const T* from) {           \
    vec<T, 4> x = *(SPACE const vec<T, 4>*)from;                             \
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;                      \
  }                                                                          \
  METAL_FUNC static void store(SPACE T* to, thread const T* from) {          \
    *(SPACE vec<T, 4>*)to = vec<T, 4>(from[0], from[1], from[2], from[3]);   \
  }

template <int N>
struct Elements {
  ELEMENTS_IN_HALVES(device)
  ELEMENTS_IN_HALVES(threadgroup)
  ELEMENTS_OF_CODES(N)
};
template <>
struct Elements<1> {
  ELEMENTS_1(device)
  ELEMENTS_1(threadgroup)
  ELEMENTS_OF_CODES(1)
};
template <>
struct Elements<2> {
  ELEMENTS_2(device)
  ELEMENTS_2(threadgroup)
  ELEMENTS_OF_CODES(2)
};
template <>
struct Elements<4> {
  ELEMENTS_4(device)
  ELEMENTS_4(threadgroup)
  ELEMENTS_OF_CODES(4)
};

#if ELEMENT_BYTES == 2
METAL_FUNC vec<T, 2> unpacked(uint bits) {
  return as_type<vec<T, 2>>(bits);
}
METAL_FUNC uint packed(T x, T y) {
  return as_type<uint>(vec<T, 2>(x, y));
}
#define ELEMENTS_8(SPACE)                                                                                        \
  METAL_FUNC static void load(thread T* to, SPACE const T* from) {                                               \
    uint4 bits = *(SPACE const uint4*)from;                                                                      \
    vec<T, 2> a = unpacked(bits.x), b = unpacked(bits.y), c = unpacked(bits.z), d = unpacked(bits.w);            \
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y, to[4] = c.x, to[5] = c.y, to[6] = d.x, to[7] = d.y;      \
  }                                                                                                              \
  METAL_FUNC static void store(SPACE T* to, thread const T* from) {                                              \
    *(SPACE uint4*)to = uint4(packed(from[0], from[1]), packed(from[2], from[3]), packed(from[4], from[5]),      \
                              packed(from[6], from[7]));                                                         \
  }
template <>
struct Elements<8> {
  ELEMENTS_8(device)
  ELEMENTS_8(threadgroup)
  ELEMENTS_OF_CODES(8)
};
#endif

// The same of a result, which may be kept in float.
template <int N>
METAL_FUNC void store_elements(device T* to, thread const T* from) {
  Elements<N>::store(to, from);
}
#if ELEMENT_BYTES == 2
template <int N>
METAL_FUNC void store_elements(device float* to, thread const float* from) {
  UNROLL for (int i = 0; i < N; ++i) to[i] = from[i];
}
#endif
