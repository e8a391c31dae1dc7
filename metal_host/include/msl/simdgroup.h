// <metal_compute>, <metal_simdgroup>, <metal_quadgroup>: barriers, shuffles, votes, reductions.
//
// Over scalars and vectors of half, float and integers of up to 32 bits: Metal 3.1 has none for bool, bfloat and 64-bit
// types.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

inline __attribute__((always_inline)) void threadgroup_barrier(mem_flags flags) {
  __mh_threadgroup_barrier(uint(flags));
}
inline __attribute__((always_inline)) void simdgroup_barrier(mem_flags flags) { __mh_simdgroup_barrier(uint(flags)); }

class simd_vote {
 public:
  typedef ulong vote_t;
  simd_vote() = default;
  explicit constexpr simd_vote(vote_t v) : bits(v) {}
  explicit constexpr operator vote_t() const { return bits; }
  constexpr bool any() const { return bits != 0; }
  constexpr bool all() const { return bits == 0xffffffffu; }

 private:
  vote_t bits;
};

}  // namespace metal

namespace __mh {

template <typename T>
struct shuffles {
  static constant constexpr bool value = false;
};
#define __MH_SHUFFLES(T)                         \
  template <>                                    \
  struct shuffles<T> {                           \
    static constant constexpr bool value = true; \
  };
__MH_SHUFFLES(half)
__MH_SHUFFLES(float)
__MH_SHUFFLES(char)
__MH_SHUFFLES(uchar)
__MH_SHUFFLES(short)
__MH_SHUFFLES(ushort)
__MH_SHUFFLES(int)
__MH_SHUFFLES(uint)
#undef __MH_SHUFFLES
template <typename T, int N>
struct shuffles<ext<T, N>> : shuffles<T> {};
template <typename T>
using shuffled = typename enable_if<shuffles<T>::value, T>::type;
template <typename T>
using shuffled_bits = typename enable_if<shuffles<T>::value && metal::is_integral<T>::value, T>::type;

struct add {
  template <typename T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct multiply {
  template <typename T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct maximum {
  template <typename T>
  static T of(T a, T b) {
    return metal::max(a, b);
  }
};
struct minimum {
  template <typename T>
  static T of(T a, T b) {
    return metal::min(a, b);
  }
};
struct bit_and {
  template <typename T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct bit_or {
  template <typename T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct bit_xor {
  template <typename T>
  static T of(T a, T b) {
    return a ^ b;
  }
};

#define __MH_COLLECTIVE inline __attribute__((always_inline, convergent))

}  // namespace __mh

namespace metal {

template <typename T, typename = void>
struct __is_valid_simdgroup_type : bool_constant<__mh::shuffles<T>::value> {};  // Apple's name

template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle(T data, ushort lane) {
  return __mh::from_lane(data, lane);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_broadcast(T data, ushort lane) {
  return __mh::from_lane(data, lane);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_broadcast_first(T data) {
  uint active;
  __mh::vote(true, active);
  return __mh::from_lane(data, uint(__builtin_ctz(active)));
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_xor(T data, ushort mask) {
  return __mh::from_lane(data, __mh_lane() ^ mask);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_up(T data, ushort delta) {  // lanes below delta keep what they have
  uint lane = __mh_lane();
  return __mh::from_lane(data, lane < delta ? lane : lane - delta);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_down(T data, ushort delta) {
  uint lane = __mh_lane();
  return __mh::from_lane(data, lane + delta > 31 ? lane : lane + delta);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_rotate_up(T data, ushort delta) {
  return __mh::from_lane(data, (__mh_lane() - delta) & 31);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_rotate_down(T data, ushort delta) {
  return __mh::from_lane(data, (__mh_lane() + delta) & 31);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_and_fill_up(T data, T filling, ushort delta, ushort modulo = 32) {
  uint lane = __mh_lane(), within = lane & (modulo - 1u);
  T lower = __mh::from_lane(data, within < delta ? lane : lane - delta);
  T fill = __mh::from_lane(filling, within < delta ? lane - within + ((within - delta) & (modulo - 1u)) : lane);
  return within < delta ? fill : lower;
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> simd_shuffle_and_fill_down(T data, T filling, ushort delta, ushort modulo = 32) {
  uint lane = __mh_lane(), within = lane & (modulo - 1u);
  bool inside = within + delta < modulo;
  T upper = __mh::from_lane(data, inside ? lane + delta : lane);
  T fill = __mh::from_lane(filling, inside ? lane : lane - within + ((within + delta) & (modulo - 1u)));
  return inside ? upper : fill;
}

#define __MH_REDUCTION(name, operation, constraint)                           \
  template <typename T>                                                       \
  __MH_COLLECTIVE __mh::constraint<T> simd_##name(T data) {                   \
    return __mh::reduce<__mh::operation>(data);                               \
  }                                                                           \
  template <typename T>                                                       \
  __MH_COLLECTIVE __mh::constraint<T> quad_##name(T data) {                   \
    data = __mh::operation::of(data, __mh::from_lane(data, __mh_lane() ^ 1)); \
    return __mh::operation::of(data, __mh::from_lane(data, __mh_lane() ^ 2)); \
  }
__MH_REDUCTION(sum, add, shuffled)
__MH_REDUCTION(product, multiply, shuffled)
__MH_REDUCTION(max, maximum, shuffled)
__MH_REDUCTION(min, minimum, shuffled)
__MH_REDUCTION(and, bit_and, shuffled_bits)
__MH_REDUCTION(or, bit_or, shuffled_bits)
__MH_REDUCTION(xor, bit_xor, shuffled_bits)
#undef __MH_REDUCTION

#define __MH_PREFIX(name, operation, identity)                             \
  template <typename T>                                                    \
  __MH_COLLECTIVE __mh::shuffled<T> simd_prefix_inclusive_##name(T data) { \
    return __mh::prefix<__mh::operation, true>(data, T(identity));         \
  }                                                                        \
  template <typename T>                                                    \
  __MH_COLLECTIVE __mh::shuffled<T> simd_prefix_exclusive_##name(T data) { \
    return __mh::prefix<__mh::operation, false>(data, T(identity));        \
  }
__MH_PREFIX(sum, add, 0)
__MH_PREFIX(product, multiply, 1)
#undef __MH_PREFIX

__MH_COLLECTIVE simd_vote simd_ballot(bool value) {
  uint active;
  return simd_vote(ulong(__mh::vote(value, active)));
}
__MH_COLLECTIVE simd_vote simd_active_threads_mask() {
  uint active;
  __mh::vote(true, active);
  return simd_vote(ulong(active));
}
__MH_COLLECTIVE bool simd_any(bool value) {
  uint active;
  return __mh::vote(value, active) != 0;
}
__MH_COLLECTIVE bool simd_all(bool value) {
  uint active;
  return __mh::vote(!value, active) == 0;
}
__MH_COLLECTIVE bool simd_is_first() {
  uint active;
  __mh::vote(true, active);
  return __mh_lane() == uint(__builtin_ctz(active));
}

template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> quad_shuffle(T data, ushort lane) {
  return __mh::from_lane(data, (__mh_lane() & ~3u) | (lane & 3));
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> quad_broadcast(T data, ushort lane) {
  return quad_shuffle(data, lane);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> quad_shuffle_xor(T data, ushort mask) {
  return __mh::from_lane(data, __mh_lane() ^ (mask & 3));
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> quad_shuffle_up(T data, ushort delta) {
  uint lane = __mh_lane();
  return __mh::from_lane(data, (lane & 3) < delta ? lane : lane - delta);
}
template <typename T>
__MH_COLLECTIVE __mh::shuffled<T> quad_shuffle_down(T data, ushort delta) {
  uint lane = __mh_lane();
  return __mh::from_lane(data, (lane & 3) + delta > 3 ? lane : lane + delta);
}
__MH_COLLECTIVE bool quad_any(bool value) {
  uint active;
  return (__mh::vote(value, active) >> (__mh_lane() & ~3u) & 15) != 0;
}
__MH_COLLECTIVE bool quad_all(bool value) {
  uint active;
  return (__mh::vote(!value, active) >> (__mh_lane() & ~3u) & 15) == 0;
}

}  // namespace metal
