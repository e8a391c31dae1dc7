"""The language: what must compile and be right, and what Metal refuses, with the line of the original source."""

import pytest
import torch

from metal_host import MetalSyntaxError, compile_shader

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def test_vector_constructors(device):
    lib = compile_shader(
        HEADER
        + """
    template <typename T> T pair(float a, float b) { return T(a, b); }
    typedef vec<float, 4> quad;
    kernel void k(device float4* out) {
      float2 ab = float2(1, 2);
      float3 abc = float3(ab, 3);
      out[0] = float4(ab, 3, 4);  out[1] = float4(0, ab, 5);  out[2] = float4(6, 7, ab);  out[3] = float4(abc, 9);
      out[4] = float4(8, abc);  out[5] = float4(ab, ab);  out[6] = float4(2.5h);  out[7] = float4(int4(1, -2, 3, -4));
      out[8] = quad(1, 2, 3, 4).wzyx;  out[9] = float4(half4(0.5h)) + float4(uchar4(uint4(1, 2, 3, 260)));
      out[10].xy = pair<float2>(1, 2);  out[10].zw = metal::vec<float, 2>(3, 4);
      out[11] = float4(bfloat2(1.0bf, 2.0bf).y);
    }""".replace("1.0bf, 2.0bf", "bfloat(1), bfloat(2)")
    )
    out = torch.zeros(12, 4, device=device)
    lib.k(out, threads=1)
    expected = [
        [1, 2, 3, 4],
        [0, 1, 2, 5],
        [6, 7, 1, 2],
        [1, 2, 3, 9],
        [8, 1, 2, 3],
        [1, 2, 1, 2],
        [2.5] * 4,
        [1, -2, 3, -4],
    ]
    expected += [[4, 3, 2, 1], [1.5, 2.5, 3.5, 4.5], [1, 2, 3, 4], [2] * 4]
    assert out.tolist() == expected


def test_structs_are_copied_between_address_spaces(device):
    lib = compile_shader(
        HEADER
        + """
    struct Inner { float a[2]; int n; };
    struct Params { Inner inner; float scale; float twice() const { return 2 * scale; } };
    class Counter { int n; public: Counter(int start) : n(start) {} void step() { n += 1;
        } int value() const { return n; } };
    Params scaled(Params p, float by) { p.scale *= by; return p; }
    kernel void k(device float* out, constant Params& p, device Params* d, uint i [[thread_position_in_grid]]) {
      threadgroup Params t[4];
      const Params q = p;
      t[i] = scaled(q, i + 1);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      Params r = t[3 - i];
      d[i] = r;
      Counter c(3);
      c.step();
      out[i] = r.twice() + r.inner.a[1] + r.inner.n + Counter{10}.value() * 100 + c.value() * 1000;
    }"""
    )
    params = torch.tensor([1.0, 2.0, 0.0, 0.5], device=device)
    params.view(torch.int32)[2] = 7
    out, d = torch.zeros(4, device=device), torch.zeros(4, 4, device=device)
    lib.k(out, params, d, threads=4, group_size=4)
    assert out.tolist() == [4000 + 1000 + 2 + 7 + 2 * 0.5 * (4 - i) for i in range(4)]
    assert d[:, 3].tolist() == [2.0, 1.5, 1.0, 0.5]


def test_templates_with_host_names(device):
    lib = compile_shader(
        HEADER
        + """
    namespace deep {
    template <typename T, int N, bool twice = false>
    [[kernel, max_total_threads_per_threadgroup(N * 32)]] void fill(device T* out [[buffer(0)]],
        constant long& value [[buffer(1)]],
                                                                    uint i [[thread_position_in_grid]]) {
      threadgroup T tile[N];
      tile[i % N] = T(value);
      out[i] = tile[i % N] * T(twice ? 2 : 1);
    }
    #define FILL(name, T, ...) template [[host_name(name "_" #T)]] [[kernel]] decltype(fill<T, __VA_ARGS__>) fill<T, \\
      __VA_ARGS__>;
    FILL("fill", float, 4)
    FILL("fill", half, 8, true)
    template [[host_name("third")]] kernel void fill<int, 2>(device int* out [[buffer(0)]],
        constant long& value [[buffer(1)]],
                                                             uint i [[thread_position_in_grid]]);
    }
    [[host_name("renamed")]] kernel void plain(device float* out) { out[0] = 5; }
    """
    )
    assert sorted(dir(lib)) == ["fill_float", "fill_half", "renamed", "third"]
    assert lib.fill_half.max_threads_per_threadgroup == 256
    assert lib.fill_half.static_thread_group_memory_length == 16
    assert lib.fill_float.static_thread_group_memory_length == 16
    for name, dtype, expected in (
        ("fill_float", torch.float32, 3),
        ("fill_half", torch.float16, 6),
        ("third", torch.int32, 3),
    ):
        out = torch.zeros(2, dtype=dtype, device=device)
        getattr(lib, name)(out, 3)
        assert out.tolist() == [expected] * 2
    out = torch.zeros(1, device=device)
    lib.renamed(out)
    assert out.item() == 5


def test_identifiers_of_a_grid_with_ragged_edges(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device uint* out, uint3 p [[thread_position_in_grid]], uint3 n [[threads_per_grid]],
        uint3 g [[threadgroup_position_in_grid]],
                  ushort3 groups [[threadgroups_per_grid]], uint3 l [[thread_position_in_threadgroup]],
                      uint3 size [[threads_per_threadgroup]],
                  uint3 full [[dispatch_threads_per_threadgroup]], uint flat [[thread_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]],
                  uint s [[simdgroup_index_in_threadgroup]], uint sn [[simdgroups_per_threadgroup]],
                      uint w [[threads_per_simdgroup]]) {
      uint at = (p.z * n.y + p.y) * n.x + p.x;
      uint r[17] = {g.x, g.y, groups.x, groups.y, groups.z, l.x, l.y, l.z, size.x, size.y, size.z, full.x, flat, lane,
          s, sn, w};
      for (int i = 0; i < 17; ++i) out[at * 17 + i] = r[i];
    }"""
    )
    nx, ny, nz, gx, gy, gz = 21, 5, 2, 8, 4, 2
    out = torch.zeros(nx * ny * nz, 17, dtype=torch.int32, device=device)
    lib.k(out, threads=(nx, ny, nz), group_size=(gx, gy, gz))
    got = out.tolist()
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                size = [min(gx, nx - x // gx * gx), min(gy, ny - y // gy * gy), min(gz, nz - z // gz * gz)]
                flat = ((z % gz) * size[1] + y % gy) * size[0] + x % gx
                total = size[0] * size[1] * size[2]
                expected = [
                    x // gx,
                    y // gy,
                    3,
                    2,
                    1,
                    x % gx,
                    y % gy,
                    z % gz,
                    *size,
                    gx,
                    flat,
                    flat % 32,
                    flat // 32,
                    -(-total // 32),
                    32,
                ]
                assert got[(z * ny + y) * nx + x] == expected


def test_names_that_are_keywords_of_opencl(device):
    lib = compile_shader(
        HEADER
        + """
    float global(float local) { return local + 1; }
    kernel void k(device float* generic) { float pipe = global(1); generic[0] = ::metal::max(pipe, 0.0f); }
    """
    )
    out = torch.zeros(1, device=device)
    lib.k(out)
    assert out.item() == 2


def test_literals_are_float(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device float* out) { out[0] = 0.1 + 0.2; out[1] = sizeof(1.0);
        out[2] = sizeof(long) + sizeof(half) + sizeof(bool); }
    """
    )
    out = torch.zeros(3, device=device)
    lib.k(out, threads=1)
    assert out[0].item() == (torch.tensor(0.1) + torch.tensor(0.2)).item()
    assert out[1:].tolist() == [4, 11]


def test_traits_and_limits():
    compile_shader(
        HEADER
        + """
    static_assert(is_same_v<remove_cv_t<const float>, float> && !is_same_v<half, bfloat>, "");
    static_assert(is_floating_point_v<bfloat> && is_integral_v<uchar> && is_signed_v<char> && is_unsigned_v<ulong>, "");
    static_assert(is_same_v<conditional_t<true, int, float>, int> && is_vector_v<float4> && is_scalar_v<half>, "");
    static_assert(is_same_v<enable_if_t<true, int>, int> && is_same_v<make_scalar_t<half4>, half>, "");
    static_assert(is_pointer_v<device int*> && is_same_v<decltype(declval<float2>()), float2>, "");
    static_assert(numeric_limits<half>::max() == 65504.0h && numeric_limits<float>::lowest() == -FLT_MAX, "");
    static_assert(numeric_limits<short>::min() == -32768 && numeric_limits<uint>::max() == 4294967295u, "");
    static_assert(sizeof(float3) == 16 && sizeof(half3) == 8 && alignof(float4) == 16 && sizeof(bool4) == 4, "");
    static_assert(integral_constant<int, 3>::value == 3 && integral_constant<int, 3>{} == 3, "");
    kernel void k(device float* out) { array<float, 3> a; a[1] = 4; out[0] = a[1] + a.size(); }
    """
    )


REFUSED = {
    "double": ("float f(float x) { double y = x; return y; }", "no double"),
    "lambda": ("float f(float x) { auto g = [](float y) { return y; }; return g(x); }", "no lambdas"),
    "virtual": ("struct S { virtual float f(); };", "no virtual"),
    "goto": ("void f() { goto end; end: return; }", "no goto"),
    "static local": ("int f() { static int calls = 0; return ++calls; }", "no static local"),
    "exceptions": ("void f() { try { } catch (...) { } }", "no exceptions"),
    "new": ("void f() { auto p = new int; }", "no operator new"),
    "if constexpr": ("void f() { if constexpr (sizeof(int) == 4) {} }", "C\\+\\+17"),
    "inline variable": ("inline constant int x = 3;", "C\\+\\+17"),
    "structured binding": ("struct P { int a, b; }; int f(P p) { auto [a, b] = p; return a; }", "C\\+\\+17"),
    "missing header function": ("float f(float x) { return erf(x); }", "erf"),
    "C library": ("float f(float x) { return expf(x); }", "expf"),
    "OpenCL function": ("uint f() { return get_global_id(0); }", "get_global_id"),
    "OpenCL keyword": ("__kernel void f() {}", "reserved for the compiler"),
    "pointer without space": ("float f(float* p) { return *p; }", "pointer type must name its address space"),
    "reference without space": ("void f(float& x) { x = 1; }", "reference type must name its address space"),
    "local pointer without space": ("void f(device float* p) { float* q = p; }", "must name its address space"),
    "device for threadgroup": (
        "void g(threadgroup float* p); void f(device float* p) { g(p); }",
        "no matching function",
    ),
    "write to constant": ("void f(constant float* p) { p[0] = 1; }", "read-only|not assignable|const"),
    "device method call": (
        "struct S { int v; int get() const { return v; } }; int f(device S* s) { return s->get(); }",
        "device S",
    ),
    "vector conversion": ("float4 f(half4 h) { return h; }", "half4"),
    "vector length": ("float4 f(float3 v) { return float4(v); }", "matching"),
    "vector cast": ("float4 f() { return (float4)(1, 2, 3, 4); }", "casts b alone"),
    "ambiguous max": ("float f(half h, float x) { return max(h, x); }", "ambiguous"),
    "int argument of exp": ("float f(int i) { return exp(i); }", "ambiguous"),
    "shuffle of bfloat": ("bfloat f(bfloat x) { return simd_sum(x); }", "no matching function"),
    "shuffle of long": ("long f(long x) { return simd_shuffle(x, 1); }", "no matching function"),
    "shuffle of bool": ("bool f(bool x) { return simd_shuffle_xor(x, 1); }", "no matching function"),
    "barrier without flags": ("void f() { threadgroup_barrier(); }", "no matching function|too few arguments"),
    "barrier with an int": (
        "void f() { threadgroup_barrier(2); }",
        "no matching function|no known conversion|cannot initialize",
    ),
    "matrix of 16": ("void f() { simdgroup_matrix<float, 16, 16> m; }", "8x8"),
    "matrix of int": ("void f() { simdgroup_matrix<int, 8, 8> m; }", "no type"),
    "matrix addend of another type": (
        "void f(simdgroup_half8x8 a, simdgroup_half8x8 c, thread simdgroup_float8x8& d)"
        "{ simdgroup_multiply_accumulate(d, a, a, c); }",
        "the result must have the addend's type",
    ),
    "matrix load of another type": (
        "void f(thread simdgroup_half8x8& a, device float* p) { simdgroup_load(a, p); }",
        "no matching function",
    ),
    "recursion": (
        "int f(int n) { return n ? n * f(n - 1) : 1; } kernel void k(device int* o) { o[0] = f(o[1]); }",
        "no recursion",
    ),
    "mutual recursion": (
        "int g(int); int f(int n) { return n ? g(n - 1) : 1; } int g(int n) { return f(n) + 1; }"
        "kernel void k(device int* o) { o[0] = f(o[1]); }",
        "no recursion: .*f.*g",
    ),
    "unknown type": ("texture2d<float> t;", "texture2d"),
    "undeclared": ("void f() { undeclared = 1; }", "undeclared"),
    "unbalanced": ("void f() { (1; }", "extraneous"),
    "attribute": ("[[clang::optnone_]] void f() {}", "attribute"),
    # kernels
    "value argument": ("kernel void k(float x) {}", "pointer or reference, not a value|pointer or reference to device"),
    "thread argument": ("kernel void k(thread float* x) {}", "device or constant memory"),
    "threadgroup argument without an index": ("kernel void k(threadgroup float* x) {}", "needs .*threadgroup"),
    "threadgroup argument 31": ("kernel void k(threadgroup float* x [[threadgroup(31)]]) {}", "threadgroups 0 to 30"),
    "identifier type": ("kernel void k(device float* o, int i [[thread_position_in_grid]]) {}", "has type"),
    "vector for an index": ("kernel void k(device float* o, uint3 i [[thread_index_in_threadgroup]]) {}", "has type"),
    "buffer 31": ("kernel void k(device float* o [[buffer(31)]]) {}", "buffers 0 to 30"),
    "buffer twice": (
        "kernel void k(device float* a [[buffer(1)]], device float* b [[buffer(1)]]) {}",
        "bound to another",
    ),
    "32 buffers": (
        "kernel void k(" + ", ".join(f"device float* b{i}" for i in range(32)) + ") {}",
        "at most 31 buffers",
    ),
    "function constant without a number": ("constant bool flag [[function_constant(n)]];", "must be a number"),
    "unknown attribute": ("kernel void k(device float* o, uint i [[thread_position_in_gird]]) {}", "not known"),
    "return value": ("kernel int k(device float* o) { return 1; }", "must return void"),
    "threadgroup in a function": ("void f() { threadgroup float x[4]; x[0] = 1; }", "local address space|kernel"),
    "initialised threadgroup": ("kernel void k(device float* o) { threadgroup float x[2] = {1, 2}; }", "initial value"),
    "two kernels of one name": (
        "kernel void k(device float* o) {} kernel void k(device int* o) {}",
        "two kernels|redefinition",
    ),
    "vertex": ("vertex float4 f() { return 0; }", "keyword of Metal"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused_with_its_line(text, message):
    with pytest.raises(SyntaxError, match=message) as caught:
        compile_shader(f"{HEADER}// a comment\n\n{text}\nkernel void other(device float* o) {{ o[0] = 1; }}\n")
    if "recursion" not in message:
        assert "program_source:5" in str(caught.value), str(caught.value)


def test_lines_behind_macros_and_headers():
    source = (
        f"{HEADER}#include <c10/metal/common.h>\n#define TWICE(x) ((x) + \\\n  (x))\n\n"
        "kernel void k(device float* out) {\n  out[0] = TWICE(missing);\n}\n"
    )
    with pytest.raises(MetalSyntaxError, match=r"program_source:8:\d+: error: use of undeclared identifier 'missing'"):
        compile_shader(source)


def test_errors_speak_of_the_users_source():
    with pytest.raises(MetalSyntaxError) as caught:
        compile_shader(
            HEADER
            + "void g(threadgroup float* p);\nkernel void k(device float* out) { g(out + float2(1, missing).x); }"
        )
    assert "__" not in str(caught.value)


def test_only_comments_and_strings_hold_other_characters():
    compile_shader("// caf\u00e9\nkernel void k(device float* o) { /* \u2014 */ }")
    with pytest.raises(SyntaxError, match=r"program_source:3: .*outside a comment"):
        compile_shader("// first\n// caf\u00e9\nkernel void caf\u00e9(device float* o) {}")


def test_constants_as_objects_and_fragments_of_any_element(device):
    """What MLX's and torch's kernels on cooperative tensors write: integral constants as operands and as indices, and vectors
    behind an alias, whose elements may be bool."""
    lib = compile_shader(
        HEADER
        + """
    template <typename T, T v> struct constant_of {
      constexpr operator T() const thread { return v; }
    };
    template <typename T, T a, typename U, U b> constexpr auto operator+(constant_of<T, a>, constant_of<U, b>) {
      constexpr auto sum = a + b;
      return constant_of<metal::remove_addrspace_t<decltype(sum)>, sum>{};
    }
    template <typename T, T a, typename U, U b> constexpr auto operator-(constant_of<T, a>, constant_of<U, b>) {
      constexpr auto difference = a - b;
      return constant_of<decltype(difference), difference>{};
    }
    struct Fragment {
      template <typename U> using elements = typename metal::vec<U, 4>;
      template <typename U> static void fill(thread elements<U>& to, U first) { to = elements<U>(0); to[0] = first; }
    };
    template <typename T> struct Tile {
      typedef typename Fragment::template elements<T> storage;
      storage value;
      void row(thread metal::vec<T, 2>& out) const { out[0] = value[0]; }
    };
    kernel void k(device float* out) {
      constexpr auto two = constant_of<int, 1>{} + constant_of<int, 1>{} + (constant_of<int, 2>{} - constant_of<int, 2>{});
      metal::vec<float, 4> some{7.0f}, all{1.0f, 2.0f, 3.0f, 4.0f};
      if constexpr (constant_of<int, 1>{} - constant_of<int, 1>{}) out[0] = -1;
      out[1] = all[two], out[2] = some[0], out[3] = some[3];
      Tile<bool> tile;
      tile.value = 1;
      out[0] = tile.value[2] ? 5.0f : 6.0f;
    }""",
        version="4.0",
    )
    out = torch.full((4,), -2.0, device=device)
    lib.k(out, threads=1)
    assert out.tolist() == [5, 3, 7, 0]
