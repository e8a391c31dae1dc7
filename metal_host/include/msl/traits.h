// <metal_type_traits>, <metal_limits>, <metal_array>, <metal_utility>.
#pragma once

namespace metal {

template <typename T, T v>
struct integral_constant {
  static constant constexpr T value = v;
  typedef T value_type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;

#define __MH_STRIP(name, qualified) \
  template <typename T>             \
  struct name {                     \
    typedef T type;                 \
  };                                \
  template <typename T>             \
  struct name<qualified> {          \
    typedef T type;                 \
  };                                \
  template <typename T>             \
  using name##_t = typename name<T>::type;
__MH_STRIP(remove_const, const T)
__MH_STRIP(remove_volatile, volatile T)
__MH_STRIP(remove_reference, thread T&)
#undef __MH_STRIP
template <typename T>
struct remove_reference<device T&> {
  typedef T type;
};
template <typename T>
struct remove_reference<constant T&> {
  typedef T type;
};
template <typename T>
struct remove_reference<threadgroup T&> {
  typedef T type;
};

template <typename T>
struct remove_cv {
  typedef remove_const_t<remove_volatile_t<T>> type;
};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;

template <bool B, typename T = void>
using enable_if = __mh::enable_if<B, T>;
template <bool B, typename T = void>
using enable_if_t = typename __mh::enable_if<B, T>::type;

template <bool B, typename T, typename F>
struct conditional {
  typedef T type;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;

template <typename A, typename B>
struct is_same : false_type {};
template <typename A>
struct is_same<A, A> : true_type {};
template <typename A, typename B>
constant constexpr bool is_same_v = is_same<A, B>::value;

// As Metal's: true for vectors of such elements too.
#define __MH_TRAIT(name)                                         \
  template <typename T>                                          \
  struct __trait_##name : false_type {};                         \
  template <typename T>                                          \
  struct name : __trait_##name<remove_cv_t<T>> {};               \
  template <typename T, int N>                                   \
  struct __trait_##name<__mh::ext<T, N>> : __trait_##name<T> {}; \
  template <typename T>                                          \
  constant constexpr bool name##_v = name<T>::value;
__MH_TRAIT(is_floating_point)
__MH_TRAIT(is_integral)
__MH_TRAIT(is_signed)
__MH_TRAIT(is_unsigned)
#undef __MH_TRAIT
#define __MH_IS(trait, T) \
  template <>             \
  struct __trait_##trait<T> : true_type {};
__MH_IS(is_floating_point, half)
__MH_IS(is_floating_point, bfloat)
__MH_IS(is_floating_point, float)
__MH_IS(is_signed, half)
__MH_IS(is_signed, bfloat)
__MH_IS(is_signed, float)
#define __MH_INTEGER(T, sign) __MH_IS(is_integral, T) __MH_IS(sign, T)
__MH_INTEGER(bool, is_unsigned)
__MH_INTEGER(char, is_signed)
__MH_INTEGER(uchar, is_unsigned)
__MH_INTEGER(short, is_signed)
__MH_INTEGER(ushort, is_unsigned)
__MH_INTEGER(int, is_signed)
__MH_INTEGER(uint, is_unsigned)
__MH_INTEGER(long, is_signed)
__MH_INTEGER(ulong, is_unsigned)
#undef __MH_INTEGER
#undef __MH_IS

template <typename T>
struct is_arithmetic : integral_constant<bool, is_floating_point<T>::value || is_integral<T>::value> {};
template <typename T>
constant constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

template <typename T>
struct __is_vector : false_type {};
template <typename T, int N>
struct __is_vector<__mh::ext<T, N>> : true_type {};
template <typename T>
struct is_vector : __is_vector<remove_cv_t<T>> {};
template <typename T>
constant constexpr bool is_vector_v = is_vector<T>::value;
template <typename T>
struct is_scalar : integral_constant<bool, is_arithmetic<T>::value && !is_vector<T>::value> {};
template <typename T>
constant constexpr bool is_scalar_v = is_scalar<T>::value;
template <typename T>
struct is_enum : integral_constant<bool, __is_enum(T)> {};
template <typename T>
constant constexpr bool is_enum_v = is_enum<T>::value;
template <typename From, typename To>
struct is_convertible : integral_constant<bool, __is_convertible(From, To)> {};
template <typename From, typename To>
constant constexpr bool is_convertible_v = is_convertible<From, To>::value;

template <typename T>
struct is_pointer : false_type {};
template <typename T>
struct is_pointer<thread T*> : true_type {};
template <typename T>
struct is_pointer<device T*> : true_type {};
template <typename T>
struct is_pointer<constant T*> : true_type {};
template <typename T>
struct is_pointer<threadgroup T*> : true_type {};
template <typename T>
constant constexpr bool is_pointer_v = is_pointer<T>::value;

template <typename T>
struct __scalar_of {
  typedef T type;
};
template <typename T, int N>
struct __scalar_of<__mh::ext<T, N>> {
  typedef T type;
};
template <typename T>
struct __elements_of : integral_constant<size_t, 1> {};
template <typename T, int N>
struct __elements_of<__mh::ext<T, N>> : integral_constant<size_t, N> {};
template <typename T>
struct vec_elements : __elements_of<remove_cv_t<T>> {};
template <typename T>
constant constexpr size_t vec_elements_v = vec_elements<T>::value;
template <typename T>
struct make_scalar : __scalar_of<remove_cv_t<T>> {};
template <typename T>
using make_scalar_t = typename make_scalar<T>::type;

#define __MH_SIGNS(S, U)    \
  template <>               \
  struct __signed_of<U> {   \
    typedef S type;         \
  };                        \
  template <>               \
  struct __unsigned_of<S> { \
    typedef U type;         \
  };
template <typename T>
struct __signed_of {
  typedef T type;
};
template <typename T>
struct __unsigned_of {
  typedef T type;
};
__MH_SIGNS(char, uchar)
__MH_SIGNS(short, ushort)
__MH_SIGNS(int, uint)
__MH_SIGNS(long, ulong)
#undef __MH_SIGNS
template <typename T>
using make_signed_t = typename __signed_of<T>::type;
template <typename T>
using make_unsigned_t = typename __unsigned_of<T>::type;

template <typename T>
T declval();

template <typename T>
struct remove_addrspace {
  typedef T type;
};
#define __MH_ADDRESS_SPACE(space)   \
  template <typename T>             \
  struct remove_addrspace<space T> { \
    typedef T type;                 \
  };
__MH_ADDRESS_SPACE(thread)
__MH_ADDRESS_SPACE(device)
__MH_ADDRESS_SPACE(constant)
__MH_ADDRESS_SPACE(threadgroup)
#undef __MH_ADDRESS_SPACE
template <typename T>
struct remove_addrspace<const thread T> {  // decltype of a constant's name
  typedef T type;
};
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <typename... T>
struct disjunction : false_type {};
template <typename A, typename... T>
struct disjunction<A, T...> : bool_constant<A::value || disjunction<T...>::value> {};
template <typename... T>
struct conjunction : true_type {};
template <typename A, typename... T>
struct conjunction<A, T...> : bool_constant<A::value && conjunction<T...>::value> {};
template <typename... T>
using _disjunction = disjunction<T...>;  // Apple's names for those, which sources use
template <typename... T>
using _conjunction = conjunction<T...>;
template <typename A>
struct negation : bool_constant<!A::value> {};

// One value for a whole simdgroup or threadgroup, which only the compiler cares about.
template <typename T>
struct uniform {
  T __value;
  uniform() = default;
  uniform(const uniform&) = default;
  constexpr uniform(T value) : __value(value) {}
  constexpr operator T() const { return __value; }
};
template <typename T>
constexpr uniform<T> make_uniform(T value) {
  return uniform<T>(value);
}

template <typename T>
struct _numeric_limits_impl {  // Apple's name, which sources specialise
  static constant constexpr bool is_specialized = false;
};
template <typename T>
struct numeric_limits : _numeric_limits_impl<remove_cv_t<T>> {};
#define __MH_FLOAT_LIMITS(T, digits_, max_exponent_, max_, min_, epsilon_, denorm_)             \
  template <>                                                                                   \
  struct _numeric_limits_impl<T> {                                                                    \
    static constant constexpr bool is_specialized = true, is_signed = true, is_integer = false; \
    static constant constexpr bool has_infinity = true, has_quiet_NaN = true;                   \
    static constant constexpr int digits = digits_, max_exponent = max_exponent_;               \
    static constexpr T max() { return T(max_); }                                                \
    static constexpr T lowest() { return T(-max_); }                                            \
    static constexpr T min() { return T(min_); }                                                \
    static constexpr T epsilon() { return T(epsilon_); }                                        \
    static constexpr T denorm_min() { return T(denorm_); }                                      \
    static constexpr T infinity() { return T(__builtin_inff()); }                               \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }                            \
  };
__MH_FLOAT_LIMITS(float, 24, 128, 0x1.fffffep+127f, 0x1p-126f, 0x1p-23f, 0x1p-149f)
__MH_FLOAT_LIMITS(half, 11, 16, 0x1.ffcp+15f, 0x1p-14f, 0x1p-10f, 0x1p-24f)
__MH_FLOAT_LIMITS(bfloat, 8, 128, 0x1.fep+127f, 0x1p-126f, 0x1p-7f, 0x1p-133f)
#undef __MH_FLOAT_LIMITS
#define __MH_INTEGER_LIMITS(T, sign, min_, max_)                                               \
  template <>                                                                                  \
  struct _numeric_limits_impl<T> {                                                                   \
    static constant constexpr bool is_specialized = true, is_signed = sign, is_integer = true; \
    static constant constexpr bool has_infinity = false, has_quiet_NaN = false;                \
    static constant constexpr int digits = 8 * sizeof(T) - sign;                               \
    static constexpr T max() { return T(max_); }                                               \
    static constexpr T lowest() { return T(min_); }                                            \
    static constexpr T min() { return T(min_); }                                               \
  };
__MH_INTEGER_LIMITS(bool, false, 0, 1)
__MH_INTEGER_LIMITS(char, true, -128, 127)
__MH_INTEGER_LIMITS(uchar, false, 0, 255)
__MH_INTEGER_LIMITS(short, true, -32768, 32767)
__MH_INTEGER_LIMITS(ushort, false, 0, 65535)
__MH_INTEGER_LIMITS(int, true, -2147483647 - 1, 2147483647)
__MH_INTEGER_LIMITS(uint, false, 0, 4294967295u)
__MH_INTEGER_LIMITS(long, true, -9223372036854775807l - 1, 9223372036854775807l)
__MH_INTEGER_LIMITS(ulong, false, 0, 18446744073709551615ul)
#undef __MH_INTEGER_LIMITS

template <typename T, size_t N>
struct array {
  T __element[N];
  typedef T value_type;

  static constexpr size_t size() { return N; }
  static constexpr bool empty() { return N == 0; }
#define __MH_ARRAY(space)                                                            \
  constexpr space T& operator[](size_t i) space& { return __element[i]; }             \
  constexpr const space T& operator[](size_t i) const space& { return __element[i]; } \
  constexpr space T* data() space { return __element; }                              \
  constexpr const space T* data() const space { return __element; }
  __MH_ARRAY(thread)
  __MH_ARRAY(device)
  __MH_ARRAY(threadgroup)
#undef __MH_ARRAY
  constexpr const constant T& operator[](size_t i) const constant& { return __element[i]; }
  constexpr T operator[](size_t i) const&& { return __element[i]; }  // of a temporary

  array() = default;
  array(const array&) = default;
  array(const constant array&) = default;
};

template <typename T>
void swap(thread T& a, thread T& b) {
  T c = a;
  a = b;
  b = c;
}

}  // namespace metal

// threadgroup T name = {0};
template <typename T>
inline void __mh_clear(threadgroup T* variable) {
  for (uint i = 0; i < sizeof(T); ++i) ((threadgroup char*)variable)[i] = 0;
}

// p += c, where c is an object that converts to an integer: clang has p + c only.
#define __MH_POINTER_UPDATE(space, sign)                                                               \
  template <typename T, typename C>                                                                   \
  inline typename __mh::enable_if<__is_class(C), space T * thread&>::type operator sign##=(space T * thread & p, C c) { \
    return p = p sign c;                                                                               \
  }
#define __MH_POINTER_UPDATES(space) __MH_POINTER_UPDATE(space, +) __MH_POINTER_UPDATE(space, -)
__MH_POINTER_UPDATES(thread)
__MH_POINTER_UPDATES(device)
__MH_POINTER_UPDATES(constant)
__MH_POINTER_UPDATES(threadgroup)
#undef __MH_POINTER_UPDATES
#undef __MH_POINTER_UPDATE
