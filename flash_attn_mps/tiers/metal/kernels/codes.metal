// Keys and values in memory, of type KV_T: elements of T, or with KV_FORMAT codes of 8 bits (E4M3 and E5M2: OCP 8-bit Floating
// Point Specification, revision 1.0). Loads decode them in registers, in units of KV_UNIT. Every T holds every value of every
// format, so decoding is exact; the unit and descales are applied where they cost nothing: those of k to the scale of the
// scores, those of v to the output.

#define KV_IS_E4M3 1
#define KV_IS_E5M2 2
#define KV_IS_INT8 3

#if KV_FORMAT == KV_IS_E4M3
constant constexpr float KV_UNIT = 256.0f;
#else
constant constexpr float KV_UNIT = 1.0f;
#endif

#if KV_FORMAT
// Two codes as the halves of a word. An e4m3 goes where a half has its bits, which gives 2^-8 of its value, subnormal numbers
// included: Apple's GPUs have them in half precision (MLX decodes in this way too), and the proof has them.
METAL_FUNC half2 halves(uint bits) {
  return as_type<half2>(bits);
}

// Four codes, the first in the lowest byte, two at a time: a shift costs four times what other operations on bits do.
METAL_FUNC void decode(thread half* to, uint codes) {
#if KV_FORMAT == KV_IS_INT8
  uint above = codes ^ 0x80808080u;  // by 128
  half2 even = halves((above & 0x00ff00ffu) | 0x64006400u) - half2(1152.0h);  // 0x6400 are 1024
  half2 odd = halves((above >> 8 & 0x00ff00ffu) | 0x64006400u) - half2(1152.0h);
#elif KV_FORMAT == KV_IS_E5M2
  half2 even = halves(codes << 8 & 0xff00ff00u), odd = halves(codes & 0xff00ff00u);  // the upper half of a half
#else
  // NaN is the largest magnitude, 127: one more reaches the highest bit, which becomes that of the half's exponent.
  uint magnitude = codes & 0x7f7f7f7fu;
  magnitude |= (magnitude + 0x01010101u) & 0x80808080u;
  half2 even = halves((magnitude << 7 & 0x7f807f80u) | (codes << 8 & 0x80008000u));
  half2 odd = halves((magnitude >> 1 & 0x7f807f80u) | (codes & 0x80008000u));
#endif
  to[0] = even.x, to[1] = odd.x, to[2] = even.y, to[3] = odd.y;
}

// Without the instructions that round to a bfloat: it has room for all.
METAL_FUNC T from_half(half x) {
#if T_IS_BFLOAT
  return as_type<T>(as_type<ushort2>(float(x)).y);
#else
  return T(x);
#endif
}

METAL_FUNC T decoded(uchar code) {
  half x[4];
  decode(x, code);
  return from_half(x[0]);
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
#define CODES_IN_A(WORD)                                                                            \
  METAL_FUNC static void load(thread T* to, device const uchar* from) {                             \
    half x[4];                                                                                      \
    decode(x, *(device const WORD*)from);                                                           \
    _Pragma("clang loop unroll(full)") for (uint i = 0; i < sizeof(WORD); ++i) to[i] = from_half(x[i]); \
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
    half x[8];
    decode(x, words.x);
    decode(x + 4, words.y);
    _Pragma("clang loop unroll(full)") for (uint i = 0; i < 8; ++i) to[i] = from_half(x[i]);
  }
};
#endif
