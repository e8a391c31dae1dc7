// Operations on cooperative tensors on NVIDIA GPUs: 16x16 fragments on the tensor cores, as m16n8k16.
//
// With lanes renumbered as in nvptx.h, hardware lane n = 4 g + t holds rows g and g + 8 and columns 4t to 4t + 3 of a
// fragment. The tensor cores' k = 2t, 2t + 1, 2t + 8, 2t + 9 are the fragment's 4t to 4t + 3, in both operands; their
// columns p of the n-th half of a result are its columns 4 (p / 2) + 2 n + p % 2. So left operands and results need no
// exchange of registers, and right operands some.
//
// The cores multiply 16-bit floats. A float is rounded to its partner's type in relaxed precision; otherwise, and
// beside another float, it is split into two bfloats: 16 bits of its fraction.
#pragma once

namespace __mh {

#define __MH_UNROLLED _Pragma("clang loop unroll(full)")

template <typename T>
constexpr bool is_byte = metal::is_same_v<T, char> || metal::is_same_v<T, uchar>;

// The type that a product is computed in, and how many of it make one of the operand's.
template <typename L, typename R, bool relaxed>
struct components {
  template <typename T>
  static constexpr bool one_is = metal::is_same_v<L, T> || metal::is_same_v<R, T>;
  static constexpr bool floats = metal::is_same_v<L, R> && metal::is_same_v<L, float>;
  static constexpr bool in_half = !one_is<bfloat> && !floats && (relaxed || !one_is<float>);
  typedef typename metal::conditional<in_half, half, bfloat>::type type;
  template <typename T>
  static constexpr int count = metal::is_same_v<T, type> || is_byte<T>                      ? 1
                               : metal::is_same_v<T, float> && relaxed && !floats ? 1
                                                                                            : 2;
};

template <typename E, typename T>
__MH_DEVICE E component(T x, int which) {
  float value = float(x);
  E high = E(value);
  return which ? E(value - float(high)) : high;
}
template <typename E>
__MH_DEVICE uint pair(E a, E b) {
  return __builtin_bit_cast(uint, ext<E, 2>{a, b});
}

#ifdef __MH_APPLE
// The operands as Apple's instruction takes them, and one instruction for a fragment's product.
template <typename E, typename T, int parts>
struct operand_registers {
  static constexpr int count = int(sizeof(T)) * 2;
  uint words[count];
  __MH_DEVICE void set(const thread T* e, bool, bool) thread {
    __MH_UNROLLED for (int i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 4)
        words[i] = __builtin_bit_cast(uint, e[i]);
      else if constexpr (sizeof(T) == 2)
        words[i] = pair(e[2 * i], e[2 * i + 1]);
      else
        words[i] = __builtin_bit_cast(uint, ext<T, 4>{e[4 * i], e[4 * i + 1], e[4 * i + 2], e[4 * i + 3]});
    }
  }
};
template <typename Left, typename Right>
__MH_DEVICE void fragment_product(thread float* d, const thread Left& a, const thread Right& b) {
  float x[8], y[8], d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4], d5 = d[5], d6 = d[6], d7 = d[7];
  __MH_UNROLLED for (int i = 0; i < 8; ++i) {
    x[i] = __builtin_bit_cast(float, a.words[i % Left::count]);
    y[i] = __builtin_bit_cast(float, b.words[i % Right::count]);
  }
#define __MH_FMA(d, a, b) "fma.rn.f32 %" #d ", %" #a ", %" #b ", %" #d "; "
  __asm__(__MH_FMA(0, 8, 16) __MH_FMA(1, 9, 17) __MH_FMA(2, 10, 18) __MH_FMA(3, 11, 19) __MH_FMA(4, 12, 20)
              __MH_FMA(5, 13, 21) __MH_FMA(6, 14, 22) __MH_FMA(7, 15, 23) "// matrix product"
          : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3), "+f"(d4), "+f"(d5), "+f"(d6), "+f"(d7)
          : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]), "f"(y[0]),
            "f"(y[1]), "f"(y[2]), "f"(y[3]), "f"(y[4]), "f"(y[5]), "f"(y[6]), "f"(y[7]));
#undef __MH_FMA
  d[0] = d0, d[1] = d1, d[2] = d2, d[3] = d3, d[4] = d4, d[5] = d5, d[6] = d6, d[7] = d7;
}
#else
// Lane g has rows g and g + 8; it gets rows 4 (g / 2) + g % 2 and 2 more.
__MH_DEVICE void spread(thread uint& low, thread uint& high) {
  uint n = __nvvm_read_ptx_sreg_tid_x() & 31, g2 = n >> 4 & 1, g1 = n >> 3 & 1, rest = n & 7;
  uint first = uint(__nvvm_shfl_sync_idx_i32(~0u, int(g1 ? high : low), int(g1 << 4 | g2 << 3 | rest), 31));
  uint second = uint(__nvvm_shfl_sync_idx_i32(~0u, int(g1 ? low : high), int(g1 << 4 | (g2 ^ 1) << 3 | rest), 31));
  low = g2 ? second : first, high = g2 ? first : second;
}
// And back.
__MH_DEVICE void unspread(thread uint& low, thread uint& high) {
  uint n = __nvvm_read_ptx_sreg_tid_x() & 31, g2 = n >> 4 & 1, g1 = n >> 3 & 1, rest = n & 7;
  uint first = uint(__nvvm_shfl_sync_idx_i32(~0u, int(g2 ? high : low), int(g1 << 4 | g2 << 3 | rest), 31));
  uint second = uint(__nvvm_shfl_sync_idx_i32(~0u, int(g2 ? low : high), int((g1 ^ 1) << 4 | g2 << 3 | rest), 31));
  low = g1 ? second : first, high = g1 ? first : second;
}

// A fragment of an operand, as the tensor cores take it.
template <typename E, typename T, int parts>
struct operand_registers {
  uint words[parts][4];
  __MH_DEVICE void set(const thread T* e, bool left, bool stored_transposed) thread {
    __MH_UNROLLED for (int part = 0; part < parts; ++part) {
      uint w[2][2];  // [pair of columns][row g, row g + 8]
      __MH_UNROLLED for (int j = 0; j < 2; ++j) __MH_UNROLLED for (int h = 0; h < 2; ++h) w[j][h] =
          pair(component<E>(e[4 * h + 2 * j], part), component<E>(e[4 * h + 2 * j + 1], part));
      if (!left || stored_transposed) __MH_UNROLLED for (int j = 0; j < 2; ++j) spread(w[j][0], w[j][1]);
      if (left == stored_transposed)
        __MH_UNROLLED for (int j = 0; j < 2; ++j) __MH_UNROLLED for (int h = 0; h < 2; ++h) w[j][h] =
            transposed(w[j][h]);
      if (left && stored_transposed) __MH_UNROLLED for (int h = 0; h < 2; ++h) unspread(w[0][h], w[1][h]);
      // Left: of the first pair of k rows g and g + 8, then of the second. Right: of each half of the columns both.
      words[part][0] = w[0][0], words[part][3] = w[1][1];
      words[part][1] = w[stored_transposed][!stored_transposed];
      words[part][2] = w[!stored_transposed][stored_transposed];
    }
  }
};

#define __MH_MMA(T, name)                                                                                            \
  __MH_DEVICE void mma(T, thread float* d, const thread uint* a, uint b0, uint b1) {                                 \
    float d0 = d[0], d1 = d[1], d2 = d[4], d3 = d[5];                                                                \
    uint a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];                                                                 \
    __asm__ volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                          \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                    \
                     : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)                                                        \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                        \
    d[0] = d0, d[1] = d1, d[4] = d2, d[5] = d3;                                                                      \
  }
__MH_MMA(half, "f16")
__MH_MMA(bfloat, "bf16")
#undef __MH_MMA
template <typename E, typename L, int a_parts, typename R, int b_parts>
__MH_DEVICE void fragment_product(thread float* d, const thread operand_registers<E, L, a_parts>& a,
                                  const thread operand_registers<E, R, b_parts>& b) {
  __MH_UNROLLED for (int i = a_parts - 1; i >= 0; --i) __MH_UNROLLED for (int j = b_parts - 1; j >= 0; --j) {
    if (i + j == 2) continue;  // below the last bit
    mma(E(0), d, a.words[i], b.words[j][0], b.words[j][1]);
    mma(E(0), d + 2, a.words[i], b.words[j][2], b.words[j][3]);
  }
}
#endif

// A lane's eight elements of the fragment (row, column), in units of fragments, of an operand as it is stored.
template <typename T, typename Extents, typename Layout>
__MH_DEVICE void fetch(const thread metal::cooperative_tensor<T, Extents, Layout>& from, int row, int column, int, int,
                       long, bool, thread T* to) {
  __MH_UNROLLED for (int i = 0; i < 8; ++i) to[i] = from.__elements[(row * Layout::across + column) * 8 + i];
}
template <typename Element, typename Extents, typename... Tags, typename T>
__MH_DEVICE void fetch(const thread metal::tensor<Element, Extents, metal::tensor_inline, Tags...>& from, int row,
                       int column, int axis, int first, long inner, bool believed, thread T* to) {
  typedef placement<tensor_layout<DESTINATION, 16, 16, false, 32, 0>> place;
  __MH_UNROLLED for (int i = 0; i < 8; ++i) {
    long at[3] = {column * 16 + place::right() + i % 4, row * 16 + place::down() + i / 4 * 8, 0};
    at[axis] += first;
    bool there = (axis > 1 || at[axis] < inner) && has(from, at, believed ? axis : -1);
    to[i] = there ? T(from.__at(at)) : T(0);
  }
}

template <typename T, typename Extents, typename Layout>
__MH_DEVICE void put(thread metal::cooperative_tensor<T, Extents, Layout>& to, int, int, int index,
                     const thread float* from) {
  __MH_UNROLLED for (int i = 0; i < 8; ++i) to.__elements[index * 8 + i] = T(from[i]);
}
template <typename Element, typename Extents, typename... Tags>
__MH_DEVICE void put(thread metal::tensor<Element, Extents, metal::tensor_inline, Tags...>& to, int row, int column,
                     int, const thread float* from) {
  typedef placement<tensor_layout<DESTINATION, 16, 16, false, 32, 0>> place;
  __MH_UNROLLED for (int i = 0; i < 8; ++i) {
    long at[2] = {column * 16 + place::right() + i % 4, row * 16 + place::down() + i / 4 * 8};
    if (has(to, at)) to.__at(at) = metal::remove_addrspace_t<Element>(from[i]);
  }
}

template <typename Shape, typename Left, typename Right, typename Destination>
__MH_DEVICE void multiply(thread Left& left, thread Right& right, thread Destination& destination) {
  static_assert(Shape::threads > 1, "execution_thread is not there on NVIDIA GPUs");
  typedef operand_element<Left> L;
  typedef operand_element<Right> R;
  typedef operand_element<Destination> T;
  typedef components<L, R, Shape::relaxed> parts;
  typedef operand_registers<typename parts::type, L, parts::template count<L>> LeftRegisters;
  typedef operand_registers<typename parts::type, R, parts::template count<R>> RightRegisters;
  typedef placement<tensor_layout<DESTINATION, Shape::n, Shape::m, false, Shape::threads, 0>> place;
  constexpr int rows = (Shape::m + 15) / 16, columns = (Shape::n + 15) / 16;
  constexpr bool in_memory = operand_traits<Destination>::memory, add = Shape::accumulate;
  const int start = place::first_fragment();
  const long inner = inner_size<Shape>(left, right);
  float d[place::per_simdgroup][8];
  __MH_UNROLLED for (int f = 0; f < place::per_simdgroup; ++f) {
    T old[8];
    const int row = in_memory ? (start + f) / columns : f / columns, column = (start + f) % columns;
    if (add) fetch(destination, row, column, 2, 0, 0, false, old);
    __MH_UNROLLED for (int i = 0; i < 8; ++i) d[f][i] = add ? float(old[i]) : 0.0f;
  }
  auto step = [&](int k, int first) __attribute__((always_inline)) {  // k: in fragments; first: where k = 0 begins
    LeftRegisters a;
    RightRegisters b[columns];
    auto take_left = [&](int row, thread LeftRegisters& to) __attribute__((always_inline)) {
      L e[8];
      fetch(left, Shape::transpose_left ? k : row, Shape::transpose_left ? row : k, Shape::transpose_left, first, inner,
            !Shape::dynamic, e);
      to.set(e, true, Shape::transpose_left);
    };
    auto take_right = [&](int column, thread RightRegisters& to) __attribute__((always_inline)) {
      R e[8];
      fetch(right, Shape::transpose_right ? column : k, Shape::transpose_right ? k : column, !Shape::transpose_right,
            first, inner, !Shape::dynamic, e);
      to.set(e, false, Shape::transpose_right);
    };
    if constexpr (Shape::threads == 32) {
      __MH_UNROLLED for (int c = 0; c < columns; ++c) take_right(c, b[c]);
      __MH_UNROLLED for (int r = 0; r < rows; ++r) {
        take_left(r, a);
        __MH_UNROLLED for (int c = 0; c < columns; ++c) fragment_product(d[r * columns + c], a, b[c]);
      }
    } else {
      __MH_UNROLLED for (int f = 0; f < place::per_simdgroup; ++f) {
        if (start + f >= rows * columns) continue;
        take_left((start + f) / columns, a);
        take_right((start + f) % columns, b[0]);
        fragment_product(d[f], a, b[0]);
      }
    }
  };
  if constexpr (Shape::dynamic) {
    for (int first = 0; first < inner; first += 16) step(0, first);
  } else {
    __MH_UNROLLED for (int k = 0; k < (Shape::k + 15) / 16; ++k) step(k, 0);
  }
  __MH_UNROLLED for (int f = 0; f < place::per_simdgroup; ++f)
    if (start + f < rows * columns) put(destination, (start + f) / columns, (start + f) % columns, f, d[f]);
}

template <typename T>
__MH_DEVICE T reduced(uint operation, T a, T b) {
  return operation == 1 ? a + b : operation == 2 ? (b > a ? b : a) : b < a ? b : a;
}
// operation: runtime.h's enum mh_reduce. Lanes of one row differ in bits 0 and 3, of one column in bits 1, 2 and 4.
template <typename Source, typename Destination, typename T>
__MH_DEVICE void reduce(const thread Source& source, thread Destination& destination, uint operation, T identity) {
  typedef typename Source::layout layout;
  constexpr bool by_rows = Destination::layout::role == ROWS;
  typedef typename metal::conditional<metal::is_same_v<T, int>, int, float>::type Sum;
  __MH_UNROLLED for (int slot = 0; slot < Destination::layout::slots; ++slot) {
    Sum value = Sum(identity);
    constexpr int count = by_rows ? layout::across * 4 : layout::down * 2;
    __MH_UNROLLED for (int i = 0; i < count; ++i) {
      int from = by_rows ? (slot / 2 * layout::across + i / 4) * 8 + slot % 2 * 4 + i % 4
                         : (i / 2 * layout::across + slot / 4) * 8 + i % 2 * 4 + slot % 4;
      if (source.is_valid_element(from)) value = reduced(operation, value, Sum(source.__elements[from]));
    }
    __MH_UNROLLED for (uint bit = 1; bit < 32; bit *= 2) if (by_rows == (bit == 1 || bit == 8)) {
      // the identity is in every lane's already
      Sum other = from_lane(value, __mh_lane() ^ bit);
      value = operation == 1 ? value + other - Sum(identity) : reduced(operation, value, other);
    }
    destination.__elements[slot] = T(value);
  }
}

}  // namespace __mh
