// <metal_matrix> and the packed vectors of <metal_pack>'s kind: columns first, as Metal has them.
#pragma once

namespace metal {

template <typename T, int Cols, int Rows>
struct matrix {
  typedef T __attribute__((ext_vector_type(Rows))) column;
  column columns[Cols];

  matrix() = default;
  matrix(const matrix&) = default;
  matrix(const constant matrix& m) {
    for (int i = 0; i < Cols; ++i) columns[i] = m.columns[i];
  }
  explicit matrix(T diagonal) {
    for (int i = 0; i < Cols; ++i)
      for (int j = 0; j < Rows; ++j) columns[i][j] = i == j ? diagonal : T(0);
  }
  template <typename U>
  explicit matrix(matrix<U, Cols, Rows> m) {
    for (int i = 0; i < Cols; ++i) columns[i] = __mh::converter<T, U, Rows>::of(m.columns[i]);
  }
  template <typename... A, typename = typename __mh::enable_if<sizeof...(A) + 1 == Cols && (Cols > 1)>::type>
  explicit matrix(column first, A... rest) {
    column all[] = {first, column(rest)...};
    for (int i = 0; i < Cols; ++i) columns[i] = all[i];
  }
#define __MH_COLUMNS(space)                                         \
  space column& operator[](int i) space { return columns[i]; }      \
  const space column& operator[](int i) const space { return columns[i]; }
  __MH_COLUMNS(thread)
  __MH_COLUMNS(device)
  __MH_COLUMNS(threadgroup)
#undef __MH_COLUMNS
  const constant column& operator[](int i) const constant { return columns[i]; }
};

template <typename T, int C, int R>
inline matrix<T, R, C> transpose(matrix<T, C, R> m) {
  matrix<T, R, C> r;
  for (int i = 0; i < C; ++i)
    for (int j = 0; j < R; ++j) r.columns[j][i] = m.columns[i][j];
  return r;
}
template <typename T, int C, int R>
inline __mh::ext<T, R> operator*(matrix<T, C, R> m, __mh::ext<T, C> v) {
  __mh::ext<T, R> r = m.columns[0] * v[0];
  for (int i = 1; i < C; ++i) r += m.columns[i] * v[i];
  return r;
}
template <typename T, int C, int R>
inline __mh::ext<T, C> operator*(__mh::ext<T, R> v, matrix<T, C, R> m) {
  return transpose(m) * v;
}
template <typename T, int C, int R, int K>
inline matrix<T, K, R> operator*(matrix<T, C, R> a, matrix<T, K, C> b) {
  matrix<T, K, R> r;
  for (int i = 0; i < K; ++i) r.columns[i] = a * b.columns[i];
  return r;
}
template <typename T, int C, int R>
inline matrix<T, C, R> operator*(matrix<T, C, R> m, T s) {
  for (int i = 0; i < C; ++i) m.columns[i] *= s;
  return m;
}
template <typename T, int C, int R>
inline matrix<T, C, R> operator*(T s, matrix<T, C, R> m) {
  return m * s;
}
template <typename T, int C, int R>
inline matrix<T, C, R> operator+(matrix<T, C, R> a, matrix<T, C, R> b) {
  for (int i = 0; i < C; ++i) a.columns[i] += b.columns[i];
  return a;
}
template <typename T, int C, int R>
inline matrix<T, C, R> operator-(matrix<T, C, R> a, matrix<T, C, R> b) {
  for (int i = 0; i < C; ++i) a.columns[i] -= b.columns[i];
  return a;
}
template <typename T, int C, int R>
inline thread matrix<T, C, R>& operator+=(thread matrix<T, C, R>& a, matrix<T, C, R> b) {
  return a = a + b;
}
}  // namespace metal

#define __MH_MATRIX_TYPES(T)            \
  typedef metal::matrix<T, 2, 2> T##2x2; \
  typedef metal::matrix<T, 2, 3> T##2x3; \
  typedef metal::matrix<T, 2, 4> T##2x4; \
  typedef metal::matrix<T, 3, 2> T##3x2; \
  typedef metal::matrix<T, 3, 3> T##3x3; \
  typedef metal::matrix<T, 3, 4> T##3x4; \
  typedef metal::matrix<T, 4, 2> T##4x2; \
  typedef metal::matrix<T, 4, 3> T##4x3; \
  typedef metal::matrix<T, 4, 4> T##4x4;
__MH_MATRIX_TYPES(float)
__MH_MATRIX_TYPES(half)
#undef __MH_MATRIX_TYPES

namespace __mh {

// As large as its elements, and aligned as one of them; arithmetic happens in the vector that it converts to.
#define __MH_PACKED(N, ...)                                          \
  template <typename T>                                              \
  struct packed<T, N> {                                              \
    T __VA_ARGS__;                                                   \
    packed() = default;                                              \
    packed(const packed&) = default;                                 \
    packed(const constant packed& p) {                               \
      for (int i = 0; i < N; ++i) (&x)[i] = (&p.x)[i];               \
    }                                                                \
    packed(ext<T, N> v) {                                            \
      for (int i = 0; i < N; ++i) (&x)[i] = v[i];                    \
    }                                                                \
    ext<T, N> unpacked() const {                                     \
      ext<T, N> v;                                                   \
      for (int i = 0; i < N; ++i) v[i] = (&x)[i];                    \
      return v;                                                      \
    }                                                                \
    operator ext<T, N>() const { return unpacked(); }                \
    operator ext<T, N>() const constant { return packed(*this).unpacked(); } \
    __MH_ELEMENTS(thread)                                            \
    __MH_ELEMENTS(device)                                            \
    __MH_ELEMENTS(threadgroup)                                       \
    const constant T& operator[](int i) const constant { return (&x)[i]; } \
  };                                                                 \
  template <typename T>                                              \
  struct maker<packed<T, N>> {                                       \
    template <typename... A>                                         \
    static packed<T, N> of(A... a) {                                 \
      return packed<T, N>(maker<ext<T, N>>::of(a...));               \
    }                                                                \
  };
#define __MH_ELEMENTS(space)                              \
  space T& operator[](int i) space { return (&x)[i]; }    \
  const space T& operator[](int i) const space { return (&x)[i]; }
__MH_PACKED(2, x, y)
__MH_PACKED(3, x, y, z)
__MH_PACKED(4, x, y, z, w)
#undef __MH_PACKED
#undef __MH_ELEMENTS

}  // namespace __mh

#define __MH_PACKED(T)                     \
  typedef __mh::packed<T, 2> packed_##T##2; \
  typedef __mh::packed<T, 3> packed_##T##3; \
  typedef __mh::packed<T, 4> packed_##T##4;
__MH_PACKED(char)
__MH_PACKED(uchar)
__MH_PACKED(short)
__MH_PACKED(ushort)
__MH_PACKED(int)
__MH_PACKED(uint)
__MH_PACKED(long)
__MH_PACKED(ulong)
__MH_PACKED(half)
__MH_PACKED(bfloat)
__MH_PACKED(float)
#undef __MH_PACKED
