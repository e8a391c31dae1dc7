// Keys and values in memory, of type KV_T: elements of T, or with KV_FORMAT codes of 8 bits (E4M3 and E5M2: OCP 8-bit Floating
// Point Specification, revision 1.0). Loads decode them in registers. Every T holds every value of every format, so decoding is
// exact; descales are applied where they cost nothing: that of k to the scale of the scores, that of v to the output.

#define KV_IS_E4M3 1
#define KV_IS_E5M2 2
#define KV_IS_INT8 3

#if KV_FORMAT
// What a code is put together in, before it becomes a T.
#if T_IS_HALF
typedef half Wide;
typedef ushort WideBits;
enum { WIDE_MANTISSA = 10, WIDE_BIAS = 15 };
#else
typedef float Wide;
typedef uint WideBits;
enum { WIDE_MANTISSA = 23, WIDE_BIAS = 127 };
#endif

// Without the instructions that round to a bfloat: it has room for all.
METAL_FUNC T from_wide(WideBits bits) {
#if T_IS_BFLOAT
  return as_type<T>(ushort(bits >> 16));
#else
  return as_type<T>(bits);
#endif
}

METAL_FUNC T decoded(uchar code) {
#if KV_FORMAT == KV_IS_INT8
  return from_wide(as_type<WideBits>(Wide(as_type<char>(code))));
#elif KV_FORMAT == KV_IS_E5M2 && T_IS_HALF
  return as_type<T>(ushort(code << 8));  // the upper half of a half
#else
  constexpr int MANTISSA = KV_FORMAT == KV_IS_E4M3 ? 3 : 2, BIAS = KV_FORMAT == KV_IS_E4M3 ? 7 : 15;
  constexpr WideBits ONE_MORE = WideBits((WIDE_BIAS - BIAS) << WIDE_MANTISSA);  // of the exponents of Wide
  WideBits magnitude = code & 127;
  WideBits bits = WideBits((magnitude << (WIDE_MANTISSA - MANTISSA)) + ONE_MORE);
  // A subnormal m 2^(1 - BIAS) / 2^MANTISSA, of the normal number (1 + m / 2^MANTISSA) 2^-BIAS that `bits` are: a GPU may take
  // subnormal operands for 0.
  Wide subnormal = Wide(2) * (as_type<Wide>(bits) - as_type<Wide>(ONE_MORE));
  if (magnitude >> MANTISSA == 0) bits = as_type<WideBits>(subnormal);
#if KV_FORMAT == KV_IS_E4M3
  if (magnitude == 127) bits |= WideBits((2 * WIDE_BIAS + 1) << WIDE_MANTISSA);  // NaN; there are no infinities
#else
  if (magnitude >= 124) bits |= WideBits((2 * WIDE_BIAS + 1) << WIDE_MANTISSA);  // infinity, NaN
#endif
  return from_wide(bits | WideBits(WideBits(code & 128) << (8 * sizeof(WideBits) - 8)));
#endif
}

// The code nearest to x: ties to even, the largest finite value beyond it. NaN stays NaN, which int8 does not have: 0.
METAL_FUNC uchar encoded(float x) {
  uint bits = as_type<uint>(x);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
#if KV_FORMAT == KV_IS_INT8
  return is_nan ? 0 : uchar(int(clamp(rint(x), -128.0f, 127.0f)) & 255);
#else
  constexpr uint MANTISSA = KV_FORMAT == KV_IS_E4M3 ? 3 : 2, BIAS = KV_FORMAT == KV_IS_E4M3 ? 7 : 15;
  constexpr uint DROPPED = 23 - MANTISSA;  // bits
  constexpr uint LEAST_NORMAL = (128 - BIAS) << 23;
  uint magnitude = min(bits & 0x7fffffff, as_type<uint>(KV_FORMAT == KV_IS_E4M3 ? 448.0f : 57344.0f));
  uint normal = ((magnitude + (1 << (DROPPED - 1)) - 1 + (magnitude >> DROPPED & 1)) >> DROPPED) - ((127 - BIAS) << MANTISSA);
  uint subnormal = uint(rint(as_type<float>(magnitude) * as_type<float>((126 + BIAS + MANTISSA) << 23)));
  uint code = is_nan ? 127 : magnitude < LEAST_NORMAL ? subnormal : normal;
  return uchar(code | (bits >> 24 & 128));
#endif
}

// N neighbouring codes, N a power of two, in one access of up to 8 bytes.
template <int N>
struct Codes {
  METAL_FUNC static void load(thread T* to, device const uchar* from) {
    Codes<N / 2>::load(to, from);
    Codes<N / 2>::load(to + N / 2, from + N / 2);
  }
};
#define CODES_IN_A(WORD)                                                      \
  METAL_FUNC static void load(thread T* to, device const uchar* from) {       \
    WORD word = *(device const WORD*)from;                                    \
    _Pragma("clang loop unroll(full)") for (uint i = 0; i < sizeof(WORD); ++i) \
      to[i] = decoded(uchar(word >> (8 * i) & 255));                          \
  }
template <>
struct Codes<1> {
  CODES_IN_A(uchar)
};
template <>
struct Codes<2> {
  CODES_IN_A(ushort)
};
template <>
struct Codes<4> {
  CODES_IN_A(uint)
};
template <>
struct Codes<8> {
  METAL_FUNC static void load(thread T* to, device const uchar* from) {
    uint2 words = *(device const uint2*)from;
    _Pragma("clang loop unroll(full)") for (uint i = 0; i < 4; ++i) {
      to[i] = decoded(uchar(words.x >> (8 * i) & 255));
      to[i + 4] = decoded(uchar(words.y >> (8 * i) & 255));
    }
  }
};
#endif
