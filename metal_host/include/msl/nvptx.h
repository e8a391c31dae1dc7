// What an NVIDIA GPU gives the library: a simdgroup is a warp, threadgroup memory is shared memory. Counterpart: cpu.h.
//
// Lanes are renumbered so that Apple's 8x8 fragments are NVIDIA's: Apple's lane {a4 a3 a2 a1 a0} holds row {a4 a2 a1}
// and columns {a3 a0 *}; hardware lane n holds row n / 4 and columns 2 (n % 4) + {0, 1}. So n4 = a4, n3 = a2, n2 = a1,
// n1 = a3.
//
// With __MH_APPLE the code is not to be run but to be counted (apple.py): lanes have Apple's numbers, all of them are active,
// and a matrix product is two instructions with the operands that Apple's has.
#pragma once

struct __mh_launch_t {
  ulong arguments[31];
  uint grid[3], group[3];  // in threads; blocks are launched in one dimension, whole warps
  uint threadgroup_offsets[31];  // in dynamic shared memory
};

#define __MH_DEVICE inline __attribute__((always_inline, convergent))

#ifdef __MH_APPLE
__MH_DEVICE uint __mh_hardware_lane(uint a) { return a; }
__MH_DEVICE uint __mh_lane() { return __nvvm_read_ptx_sreg_tid_x() & 31; }
__MH_DEVICE uint __mh_active() { return ~0u; }
#else
__MH_DEVICE uint __mh_hardware_lane(uint a) {
  return (a & 16) | ((a & 4) << 1) | ((a & 2) << 1) | ((a & 8) >> 2) | (a & 1);
}
__MH_DEVICE uint __mh_lane() {
  uint n = __nvvm_read_ptx_sreg_tid_x() & 31;
  return (n & 16) | ((n & 2) << 2) | ((n & 8) >> 1) | ((n & 4) >> 1) | (n & 1);
}
__MH_DEVICE uint __mh_active() {
  uint mask;
  __asm__ volatile("activemask.b32 %0;" : "=r"(mask));
  return mask;
}
#endif

struct __mh_context_t {
  __mh_launch_t launch;
  uint count[3], position[3], size[3], thread_index;

  // False for the threads that only fill up the last warp.
  bool locate() thread {
    uint block[3] = {uint(__nvvm_read_ptx_sreg_ctaid_x()), uint(__nvvm_read_ptx_sreg_ctaid_y()),
                     uint(__nvvm_read_ptx_sreg_ctaid_z())};
    _Pragma("clang loop unroll(full)") for (int i = 0; i < 3; ++i) {
      position[i] = block[i];
      count[i] = (launch.grid[i] + launch.group[i] - 1) / launch.group[i];
      uint left = launch.grid[i] - block[i] * launch.group[i];
      size[i] = left < launch.group[i] ? left : launch.group[i];
    }
    thread_index = (__nvvm_read_ptx_sreg_tid_x() & ~31u) + __mh_lane();
    return thread_index < size[0] * size[1] * size[2];
  }
  ulong argument(uint index) const thread { return launch.arguments[index]; }
  ulong threadgroup_argument(uint index) const thread {  // nvidia.py declares the variable
    ulong address;
    __asm__("mov.b64 %0, __mh_dynamic_shared;" : "=l"(address));
    return address + launch.threadgroup_offsets[index];
  }
  uint in_group(uint axis) const thread {
    return axis == 0   ? thread_index % size[0]
           : axis == 1 ? thread_index / size[0] % size[1]
                       : thread_index / size[0] / size[1];
  }
  uint identifier(uint which, uint axis) const thread {  // numbers: kernels.py
    switch (which) {
      case 0:
        return position[axis] * launch.group[axis] + in_group(axis);
      case 1:
        return launch.grid[axis];
      case 2:
        return position[axis];
      case 3:
        return count[axis];
      case 4:
        return in_group(axis);
      case 5:
        return size[axis];
      case 6:
        return launch.group[axis];
      case 7:
        return thread_index;
      case 8:
        return thread_index % 32;
      case 9:
        return thread_index / 32;
      case 10:
        return (size[0] * size[1] * size[2] + 31) / 32;
      case 12:
        return thread_index % 4;
      case 13:
        return thread_index / 4;
      case 14:
        return (size[0] * size[1] * size[2] + 3) / 4;
      default:
        return 32;
    }
  }
};
#define __MH_ENTRY(symbol, call, limit)              \
  extern "C" {                                       \
  __kernel void symbol(__mh_launch_t launch) {       \
    __mh_context_t context;                          \
    context.launch = launch;                         \
    if (context.locate()) __MH_UNPACK call(context); \
  }                                                  \
  device uint symbol##_max_threads = limit;          \
  }

__MH_DEVICE void __mh_threadgroup_barrier(uint) { __syncthreads(); }
__MH_DEVICE void __mh_simdgroup_barrier(uint) { __nvvm_bar_warp_sync(__mh_active()); }

// libdevice's functions: to a few ulp, as Metal's precise ones.
#define __MH_LIBDEVICE(name)                               \
  extern "C" float __nv_##name##f(float);                  \
  namespace __mh_f {                                       \
  inline float name(float x) { return __nv_##name##f(x); } \
  }
__MH_LIBDEVICE(acos)
__MH_LIBDEVICE(acosh)
__MH_LIBDEVICE(asin) __MH_LIBDEVICE(asinh) __MH_LIBDEVICE(atan) __MH_LIBDEVICE(atanh) __MH_LIBDEVICE(cos)
    __MH_LIBDEVICE(cosh) __MH_LIBDEVICE(sin) __MH_LIBDEVICE(sinh) __MH_LIBDEVICE(tan) __MH_LIBDEVICE(tanh)
        __MH_LIBDEVICE(exp) __MH_LIBDEVICE(exp2) __MH_LIBDEVICE(log) __MH_LIBDEVICE(log2) __MH_LIBDEVICE(log10)
#undef __MH_LIBDEVICE
            extern "C" float __nv_atan2f(float, float);
extern "C" float __nv_powf(float, float);
extern "C" float __nv_fmodf(float, float);
extern "C" float __nv_ldexpf(float, int);
namespace __mh_f {
inline float atan2(float y, float x) { return __nv_atan2f(y, x); }
inline float pow(float x, float y) { return __nv_powf(x, y); }
inline float fmod(float x, float y) { return __nv_fmodf(x, y); }
inline float ldexp(float x, int e) { return __nv_ldexpf(x, e); }
inline float sqrt(float x) { return __nvvm_sqrt_rn_f(x); }
inline float rsqrt(float x) { return __nvvm_rsqrt_approx_f(x); }
}  // namespace __mh_f
namespace __mh_fast {
using namespace __mh_f;
inline float exp2(float x) { return __nvvm_ex2_approx_f(x); }
inline float divide(float x, float y) { return __nvvm_div_approx_f(x, y); }
inline float exp(float x) { return __nvvm_ex2_approx_f(x * 1.44269504088896340736f); }
inline float log2(float x) { return __nvvm_lg2_approx_f(x); }
inline float log(float x) { return __nvvm_lg2_approx_f(x) * 0.69314718055994530942f; }
}  // namespace __mh_fast

namespace __mh {

template <typename T>
__MH_DEVICE T from_lane(T value, uint lane) {
  union {
    T value;
    uint words[(sizeof(T) + 3) / 4];
  } data;
  data.words[(sizeof(T) - 1) / 4] = 0;
  data.value = value;
  uint active = __mh_active(), source = __mh_hardware_lane(lane & 31);
  _Pragma("clang loop unroll(full)") for (uint i = 0; i < (sizeof(T) + 3) / 4; ++i) data.words[i] =
      uint(__nvvm_shfl_sync_idx_i32(active, int(data.words[i]), int(source), 31));
  return data.value;
}

#ifdef __MH_APPLE
__MH_DEVICE uint in_metal_order(uint lanes) { return lanes; }
#else
__MH_DEVICE uint in_metal_order(uint lanes) {  // a set of hardware lanes as a set of Metal's
  uint t = ((lanes >> 2) ^ lanes) & 0x0c0c0c0cu;
  lanes ^= t ^ (t << 2);
  t = ((lanes >> 4) ^ lanes) & 0x00f000f0u;
  return lanes ^ t ^ (t << 4);
}
#endif
__MH_DEVICE uint vote(bool value, thread uint& active) {
  uint lanes = __mh_active();
  active = in_metal_order(lanes);
  return in_metal_order(__nvvm_vote_ballot_sync(lanes, value));
}

template <typename Op, typename T>
__MH_DEVICE T reduce(T value) {
  uint lanes = __mh_active();
  if (lanes == ~0u) {
    _Pragma("clang loop unroll(full)") for (uint o = 16; o; o /= 2) value =
        Op::of(value, from_lane(value, __mh_lane() ^ o));
    return value;
  }
  uint rest = in_metal_order(lanes);
  T result = from_lane(value, uint(__builtin_ctz(rest)));
  for (rest &= rest - 1; rest; rest &= rest - 1) result = Op::of(result, from_lane(value, uint(__builtin_ctz(rest))));
  return result;
}
template <typename Op, bool inclusive, typename T>
__MH_DEVICE T prefix(T value, T identity) {
  T result = identity;
  for (uint rest = in_metal_order(__mh_active()); rest; rest &= rest - 1) {
    uint lane = uint(__builtin_ctz(rest));
    T other = from_lane(value, lane);
    if (inclusive ? lane <= __mh_lane() : lane < __mh_lane()) result = Op::of(result, other);
  }
  return result;
}

#ifdef __MH_APPLE
// simd_matrix_fmadd: a lane's two elements of each operand, and of the addend in place. What it computes is meaningless.
#define __MH_MMA16(T)                                                                                 \
  __MH_DEVICE ext<float, 2> matrix_product(ext<T, 2> a, ext<T, 2> b, ext<float, 2> c) {               \
    float d0 = c.x, d1 = c.y;                                                                         \
    __asm__("fma.rn.f32 %0, %2, %3, %0; fma.rn.f32 %1, %2, %3, %1; // matrix product"                 \
            : "+f"(d0), "+f"(d1)                                                                      \
            : "f"(__builtin_bit_cast(float, a)), "f"(__builtin_bit_cast(float, b)));                  \
    return ext<float, 2>{d0, d1};                                                                     \
  }
__MH_MMA16(half)
__MH_MMA16(bfloat)
#undef __MH_MMA16
__MH_DEVICE ext<float, 2> matrix_product(ext<float, 2> a, ext<float, 2> b, ext<float, 2> c) {
  float d0 = c.x, d1 = c.y, a0 = a.x, a1 = a.y, b0 = b.x, b1 = b.y;
  __asm__("fma.rn.f32 %0, %2, %4, %0; fma.rn.f32 %1, %3, %5, %1; // matrix product"
          : "+f"(d0), "+f"(d1)
          : "f"(a0), "f"(a1), "f"(b0), "f"(b1));
  return ext<float, 2>{d0, d1};
}
#elif defined(__MH_ALU_MATRICES)
// As Apple's M1 to M4 compute a product: 16 multiplications and additions a lane on the ordinary ALUs, in two chains. For
// timing; what it computes is meaningless.
#define __MH_CHAIN "fma.rn.f32 %0, %2, %3, %0; fma.rn.f32 %1, %2, %3, %1; "
#define __MH_CHAINS __MH_CHAIN __MH_CHAIN __MH_CHAIN __MH_CHAIN __MH_CHAIN __MH_CHAIN __MH_CHAIN __MH_CHAIN
#define __MH_MMA16(T)                                                                                 \
  __MH_DEVICE ext<float, 2> matrix_product(ext<T, 2> a, ext<T, 2> b, ext<float, 2> c) {               \
    float d0 = c.x, d1 = c.y;                                                                         \
    __asm__ volatile(__MH_CHAINS                                                                      \
                     : "+f"(d0), "+f"(d1)                                                             \
                     : "f"(__builtin_bit_cast(float, a)), "f"(__builtin_bit_cast(float, b)));         \
    return ext<float, 2>{d0, d1};                                                                     \
  }
__MH_MMA16(half)
__MH_MMA16(bfloat)
#undef __MH_MMA16
__MH_DEVICE ext<float, 2> matrix_product(ext<float, 2> a, ext<float, 2> b, ext<float, 2> c) {
  float d0 = c.x, d1 = c.y, a0 = a.x + a.y, b0 = b.x + b.y;
  __asm__ volatile(__MH_CHAINS : "+f"(d0), "+f"(d1) : "f"(a0), "f"(b0));
  return ext<float, 2>{d0, d1};
}
#undef __MH_CHAINS
#undef __MH_CHAIN
#else
// d = a b + c on the tensor cores: the upper half of m16n8k8, the lower eight rows zero.
__MH_DEVICE uint transposed(uint pair) {  // an 8x8 matrix of 16-bit elements
  uint result;
  __asm__ volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
#define __MH_MMA16(T, name)                                                                                     \
  __MH_DEVICE ext<float, 2> matrix_product(ext<T, 2> a, ext<T, 2> b, ext<float, 2> c) {                         \
    float d0, d1, d2, d3, c0 = c.x, c1 = c.y;                                                                   \
    __asm__ volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                      \
                     ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%9};"                                        \
                     : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                                   \
                     : "r"(__builtin_bit_cast(uint, a)), "r"(0u), "r"(transposed(__builtin_bit_cast(uint, b))), \
                       "f"(c0), "f"(c1), "f"(0.0f));                                                            \
    return ext<float, 2>{d0, d1};                                                                               \
  }
__MH_MMA16(half, "f16")
__MH_MMA16(bfloat, "bf16")
#undef __MH_MMA16

// A lane's two elements go to k = t and t + 4 of tf32's k = 8 on both sides.
__MH_DEVICE ext<float, 2> matrix_product_tf32(uint a0, uint a1, uint b0, uint b1, ext<float, 2> c) {
  float d0, d1, d2, d3, c0 = c.x, c1 = c.y;
  __asm__ volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%9,%10,%11,%11};"
      : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
      : "r"(a0), "r"(0u), "r"(a1), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(0.0f));
  return ext<float, 2>{d0, d1};
}
__MH_DEVICE ext<float, 2> matrix_product(ext<float, 2> a, ext<float, 2> b, ext<float, 2> c) {
  float b_first = b.x, b_second = b.y, a_first = a.x, a_second = a.y;
  uint bits0 = __builtin_bit_cast(uint, b_first), bits1 = __builtin_bit_cast(uint, b_second);
  uint high = transposed((bits0 >> 16) | (bits1 & 0xffff0000u)), low = transposed((bits0 & 0xffffu) | (bits1 << 16));
  uint b0 = (high << 16) | (low & 0xffffu), b1 = (high & 0xffff0000u) | (low >> 16);
  uint a0 = __builtin_bit_cast(uint, a_first), a1 = __builtin_bit_cast(uint, a_second);
#ifdef __MH_FAST_MATRICES
  return matrix_product_tf32(a0, a1, b0, b1, c);
#else
  // x = high + low with 11 bits each: three products give float's precision but for the last bits.
#define __MH_SPLIT(x)                                                                  \
  uint x##_high = x & 0xffffe000u;                                                     \
  float x##_rest = __builtin_bit_cast(float, x) - __builtin_bit_cast(float, x##_high); \
  uint x##_low = __builtin_bit_cast(uint, x##_rest);
  __MH_SPLIT(a0)
  __MH_SPLIT(a1)
  __MH_SPLIT(b0) __MH_SPLIT(b1)
#undef __MH_SPLIT
      c = matrix_product_tf32(a0_low, a1_low, b0_high, b1_high, c);
  c = matrix_product_tf32(a0_high, a1_high, b0_low, b1_low, c);
  return matrix_product_tf32(a0_high, a1_high, b0_high, b1_high, c);
#endif
}
#endif

#define __MH_MATRIX_LOAD(statement) statement
#define __MH_MATRIX_STORE(statement) statement
#define __MH_TENSOR_LOAD(statement) statement
#define __MH_TENSOR_STORE(statement) statement
#define __mh_tensor_fault(fault)

// Declared as a global and turned to shared memory in the PTX (nvidia.py); the assembly keeps the optimiser from seeing
// a pointer to global memory used as one to shared.
template <typename Tag, typename T>
struct threadgroup_variable {
  static device char storage[sizeof(T)];
  static __MH_DEVICE threadgroup T* get() {
    ulong address = (ulong)&storage;
    __asm__("mov.b64 %0, %0;" : "+l"(address));
    return (threadgroup T*)address;
  }
};
template <typename Tag, typename T>
__attribute__((aligned(16))) device char threadgroup_variable<Tag, T>::storage[sizeof(T)];

// The compiler's atomics take integers; float's additions apart, the other types go by their bits.
template <typename P>
struct bits {
  typedef P pointer;
};
#define __MH_BITS(T, U)             \
  template <>                       \
  struct bits<device T*> {          \
    typedef device U* pointer;      \
  };                                \
  template <>                       \
  struct bits<threadgroup T*> {     \
    typedef threadgroup U* pointer; \
  };
__MH_BITS(float, uint)
__MH_BITS(bool, uchar)
#undef __MH_BITS
template <typename P>
using bits_pointer = typename bits<P>::pointer;
template <typename P>
struct pointed;
template <typename T>
struct pointed<device T*> {
  typedef T type;
};
template <typename T>
struct pointed<threadgroup T*> {
  typedef T type;
};
template <typename P>
using bits_type = typename pointed<bits_pointer<P>>::type;

template <typename Op>
struct atomic_operation;
#define __MH_ATOMIC_OPERATION(Op, builtin)                \
  struct Op;                                              \
  template <>                                             \
  struct atomic_operation<Op> {                           \
    template <typename P, typename T>                     \
    static __MH_DEVICE T of(P pointer, T operand) {       \
      return builtin(pointer, operand, __ATOMIC_RELAXED); \
    }                                                     \
  };
__MH_ATOMIC_OPERATION(add, __atomic_fetch_add)
__MH_ATOMIC_OPERATION(maximum, __atomic_fetch_max)
__MH_ATOMIC_OPERATION(minimum, __atomic_fetch_min)
__MH_ATOMIC_OPERATION(bit_and, __atomic_fetch_and)
__MH_ATOMIC_OPERATION(bit_or, __atomic_fetch_or)
__MH_ATOMIC_OPERATION(bit_xor, __atomic_fetch_xor)
#undef __MH_ATOMIC_OPERATION
struct subtract;
template <>
struct atomic_operation<subtract> {
  template <typename P, typename T>
  static __MH_DEVICE T of(P pointer, T operand) {
    return __atomic_fetch_add(pointer, T(-operand), __ATOMIC_RELAXED);
  }
};
struct exchange;
template <>
struct atomic_operation<exchange> {
  template <typename P, typename T>
  static __MH_DEVICE T of(P pointer, T operand) {
    bits_type<P> value = __builtin_bit_cast(bits_type<P>, operand);
    return __builtin_bit_cast(T, __atomic_exchange_n((bits_pointer<P>)pointer, value, __ATOMIC_RELAXED));
  }
};
template <typename Op, typename P, typename T>
__MH_DEVICE T atomic_update(P pointer, T operand) {
  return atomic_operation<Op>::of(pointer, operand);
}
template <typename P>
__MH_DEVICE typename pointed<P>::type atomic_load(P pointer) {
  bits_type<P> value = __atomic_load_n((bits_pointer<P>)pointer, __ATOMIC_RELAXED);
  return __builtin_bit_cast(typename pointed<P>::type, value);
}
template <typename P, typename T>
__MH_DEVICE void atomic_store(P pointer, T value) {
  __atomic_store_n((bits_pointer<P>)pointer, __builtin_bit_cast(bits_type<P>, value), __ATOMIC_RELAXED);
}
template <typename P, typename T>
__MH_DEVICE bool atomic_compare_exchange(P pointer, thread T* expected, T desired) {
  bits_type<P> before = __builtin_bit_cast(bits_type<P>, *expected), after = __builtin_bit_cast(bits_type<P>, desired);
  bool same =
      __atomic_compare_exchange_n((bits_pointer<P>)pointer, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  *expected = __builtin_bit_cast(T, before);
  return same;
}

}  // namespace __mh
