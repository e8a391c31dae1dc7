"""Language that kernels of other projects use: function constants, threadgroup arguments, casts, classes, versions."""

import pytest
import torch

from metal_host import KernelFault, compile_shader, observe

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def floats(text, n=1, threads=1, tensors=(), version="3.1", **options):
    """The n floats that kernel k writes to its first buffer."""
    out = torch.zeros(n)
    compile_shader(HEADER + text, version=version, **options).k(out, *tensors, threads=threads)
    return out.tolist()


CONSTANTS = """
constant bool causal [[function_constant(3)]];
constant int n [[function_constant(2 + 2)]];
static constant constexpr float scale [[function_constant(05)]];
constant bool flag [[function_constant(6)]];
constant bool with_default = is_function_constant_defined(flag) ? flag : true;
constant int twice = 2 * n;
kernel void k(device float* o, constant float* extra [[buffer(1), function_constant(causal)]]) {
  o[0] = causal ? extra[0] : -1; o[1] = n; o[2] = scale; o[3] = with_default; o[4] = twice;
  o[5] = is_function_constant_defined(flag);
}
kernel void guarded(device float* o) { if (is_function_constant_defined(flag) && flag) o[0] = 1; }
kernel void direct(device float* o) { o[0] = flag; }
inline int through() { return twice; }
kernel void indirect(device float* o) { o[0] = through(); }
"""


def test_function_constants_by_name_and_number():
    given = {"causal": True, 4: -7, "scale": 0.1}
    assert floats(CONSTANTS, 6, tensors=(torch.tensor([8.0]),), constants=given) == pytest.approx(
        [8, -7, 0.1, 1, -14, 0]
    )
    given = {3: False, 4: 7, 5: -float("inf"), 6: False}
    assert floats(CONSTANTS, 6, constants=given) == [-1, 7, -float("inf"), 0, 14, 1]


def test_function_constants_without_a_value():
    lib = compile_shader(HEADER + CONSTANTS)
    lib.guarded(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"'direct' needs function constants that have no value: flag$"):
        lib.direct  # noqa: B018
    with pytest.raises(RuntimeError, match=r"'indirect' needs .*: twice"):
        lib.indirect  # noqa: B018
    with pytest.raises(RuntimeError, match=r"'k' needs .*: causal, n, scale"):
        lib.k  # noqa: B018


def test_function_constants_that_do_not_exist():
    with pytest.raises(ValueError, match=r"no function constant 'casual'; it has causal \(3\), n \(4\)"):
        compile_shader(HEADER + CONSTANTS, constants={"casual": True})
    with pytest.raises(TypeError, match="constants: n must be"):
        compile_shader(HEADER + CONSTANTS, constants={"n": "7"})


def test_an_argument_that_a_constant_takes_away_may_be_none():
    lib = compile_shader(HEADER + CONSTANTS, constants={3: False, 4: 1, 5: 1.0})
    lib.k(torch.zeros(6), None, threads=1)
    lib = compile_shader(HEADER + CONSTANTS, constants={3: True, 4: 1, 5: 1.0})
    with pytest.raises(RuntimeError, match=r"no argument for extra \[\[buffer\(1\)\]\]"):
        lib.k(torch.zeros(6), None, threads=1)


REVERSE = """
kernel void k(device float* o, threadgroup float* s [[threadgroup(1)]], threadgroup int& last [[threadgroup(0)]],
              uint i [[thread_position_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
  s[i] = o[i];
  if (i == 0) last = int(n) - 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = s[last - int(i)];
}"""


def test_threadgroup_arguments_on_a_device(device):
    out = torch.arange(64.0, device=device)
    compile_shader(HEADER + REVERSE).k(out, threads=64, group_size=64, threadgroup_bytes={0: 16, 1: 256})
    assert out.tolist() == list(range(63, -1, -1))


def test_threadgroup_arguments():
    lib = compile_shader(HEADER + REVERSE)
    out = torch.arange(64.0)
    for instrumented in (False, True):
        with observe(instrumented=instrumented):
            lib.k(out, threads=64, group_size=64, threadgroup_bytes={0: 16, 1: 256})
    assert out.tolist() == list(range(64))
    with observe(), pytest.raises(KernelFault, match=r"past the end of threadgroup 's' \(240 bytes\)"):
        lib.k(out, threads=64, group_size=64, threadgroup_bytes={0: 16, 1: 240})
    with pytest.raises(RuntimeError, match=r"no length for s \[\[threadgroup\(1\)\]\]"):
        lib.k(out, threads=64, threadgroup_bytes={0: 16})
    with pytest.raises(ValueError, match="multiple of 16"):
        lib.k(out, threads=64, threadgroup_bytes={0: 16, 1: 250})
    with pytest.raises(RuntimeError, match="maximum is 32768"):
        lib.k(out, threads=64, threadgroup_bytes={0: 16, 1: 32768})


def test_vector_casts_and_initialisers():
    text = """
    template <typename T> T convert(half4 h) { return (T)h + static_cast<T>(h) + T(h); }
    constant uint3 table = {1, 2, 3};
    float sum(uint3 v, int n) { return v.x + 10 * v.y + 100 * v.z + n; }
    kernel void k(device float* o) {
      half4 h = half4(1, 2, 3, 4);
      float2 v(1, 2);
      float4 z = {3}, y{1, 2};
      float4 f = (float4)h + convert<float4>(h) * (float4) h;
      h *= 0.5f;
      bfloat4 b = bfloat4(h);
      o[0] = v.x + v.y; o[1] = z.x + z.y; o[2] = y.y + y.z; o[3] = f.w; o[4] = h.w; o[5] = half4(b).z; o[6] = table.z;
      o[7] = sum({1, 2, 3}, 4000); o[8] = half(bfloat(1.5h)); o[9] = (h * 2.0f).x;
    }"""
    assert floats(text, 10) == [3, 3, 2, 52, 2, 1.5, 3, 4321, 1.5, 1]


def test_matrices_and_packed_vectors():
    text = """
    struct Vertex { packed_float3 at; half weight; };
    kernel void k(device float* o, device packed_float3* p, constant float2x3& m) {
      float3x3 twice(2.0);
      float3 q = twice * float3(p[0]) + p[1];
      p[1] = q; p[0].x = 9;
      o[0] = q.x; o[1] = q.z; o[2] = sizeof(Vertex); o[3] = sizeof(float3x3); o[4] = (m * float2(1, 10)).z;
      o[5] = (transpose(m) * float3(1, 0, 0)).y; o[6] = m[1][0];
    }"""
    packed, matrix = torch.arange(1.0, 7), torch.tensor([[1.0, 2, 3, 0], [4, 5, 6, 0]])
    assert floats(text, 7, tensors=(packed, matrix)) == [6, 12, 16, 48, 63, 4, 4]
    assert packed.tolist() == [9, 2, 3, 6, 9, 12]


def test_quadgroups():
    text = """
    kernel void k(device float* o, uint i [[thread_position_in_grid]], ushort lane [[thread_index_in_quadgroup]],
                  ushort quad [[quadgroup_index_in_threadgroup]], ushort n [[quadgroups_per_threadgroup]]) {
      o[i] = lane + 10 * quad + 100 * n;
    }"""
    assert floats(text, 8, threads=8) == [200, 201, 202, 203, 210, 211, 212, 213]


def test_names_types_and_literals():
    text = """
    #define __STRANGE__ 3
    static_assert(is_same_v<int8_t, char> && vec_elements<float3>::value == 3, "");
    template <typename T> T half_of(T x) { return x * 0.5; }
    template <typename T, enable_if_t<sizeof(T) < 8, bool> = true> T small(T x) { return x; }
    struct S { uint8_t bytes[(16 - 4) / 4]; };
    inline void store(device float* __restrict__ p, float __value__) { *p = __value__; }
    kernel void k(device float* o) {
      *o = 0; *(o + 1) = 1;
      store(o + 2, __STRANGE__); o[3] = sizeof(S); o[4] = half_of(16777217.0f); o[5] = small(6); o[6] = sizeof(0.1 * 1);
    }"""
    assert floats(text, 7) == [0, 1, 3, 3, 8388608, 6, 4]


def test_literals_in_templates_are_float():
    text = """
    template <typename T> T third(T x) { return x / 3.0 + 0.1; }
    kernel void k(device float* o) { o[0] = third(1.0f); }"""
    one = torch.ones(1)
    assert floats(text) == (one / 3 + torch.tensor(0.1)).tolist()


def test_functions_as_template_arguments_and_integers_as_objects():
    text = """
    template <int v> struct Int { constexpr operator int() const { return v; } };
    inline void twice(thread float& x) { x *= 2; }
    template <typename T> using Step = void (*)(thread T&);
    template <void (*f)(thread float&)> float once(float x) { f(x); return x; }
    template <typename T, Step<T> f> float again(T x) { f(x); f(x); return x; }
    kernel void k(device float* o) {
      device float* p = o;
      p += Int<1>{};  p[0] = once<twice>(4);
      p += Int<2>{};  p -= Int<1>{};  p[0] = again<float, twice>(4);
      o[0] = 3 * Int<5>{};
    }"""
    assert floats(text, 3) == [15, 8, 16]


def test_products_of_two_types():
    text = """
    kernel void k(device float* o, device half* a, device float* b) {
      simdgroup_half8x8 x; simdgroup_float8x8 y, z = simdgroup_float8x8(0);
      simdgroup_load(x, a); simdgroup_load(y, b);
      simdgroup_multiply_accumulate(z, x, y, z);
      simdgroup_store(z * simdgroup_float8x8(2), o);
    }"""
    a, b = torch.randn(8, 8).half(), torch.randn(8, 8)
    got = torch.tensor(floats(text, 64, threads=32, tensors=(a, b))).view(8, 8)
    torch.testing.assert_close(got, 2 * a.float() @ b)


def test_constructors_in_address_spaces_and_temporaries():
    text = """
    struct C {
      float re, im;
      constexpr C(float a, float b) thread : re(a), im(b) {}
      constexpr C(float a) thread : re(a), im(0) {}
      constexpr C(float a) constant : re(a), im(-1) {}
      C() threadgroup : re(0), im(0) {}
      float norm() const { return re * re + im * im; }
    };
    constant C unit(1);
    inline float both(const thread C& x, const thread float& y) { return x.norm() + y; }
    kernel void k(device C* o, device float* r, uint i [[thread_position_in_grid]]) {
      if (i < 1) { threadgroup C shared[2]; shared[0] = C(2, 3); o[0] = shared[0]; }
      C x = i ? o[1] : C(7, 8);
      x = unit;
      r[0] = both(C(3, 4), 1 + r[0]); r[1] = C(1, 2).norm(); r[2] = x.im;
    }"""
    out, r = torch.zeros(4), torch.zeros(3)
    compile_shader(HEADER + text).k(out, r, threads=1)
    assert r.tolist() == [26, 5, -1] and out.tolist() == [2, 3, 0, 0]


def test_threadgroup_variables_in_blocks():
    text = """
    kernel void k(device float* o, uint i [[thread_position_in_grid]]) {
      for (int r = 0; r < 2; ++r) {
        threadgroup float s[4] = {0};
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i < 2) s[i] = i + r;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[i] += s[3 - i] + s[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
    }"""
    assert floats(text, 4, threads=4) == [1, 3, 3, 1]


def test_an_instantiation_whose_arguments_are_deduced():
    text = """
    template <typename T, int n> struct P { T v[n]; };
    template <typename T, int n> [[kernel]] void fill(device T* o [[buffer(0)]], constant P<T, n>& p [[buffer(1)]],
                                                      uint i [[thread_position_in_grid]]) { o[i] = p.v[i] + n; }
    template [[host_name("k")]] [[kernel]] void fill(device float* o [[buffer(0)]], constant P<float, 3>& p [[buffer(1)]],
                                                     uint i [[thread_position_in_grid]]);"""
    assert floats(text, 3, threads=3, tensors=(torch.tensor([1.0, 2, 3]),)) == [4, 5, 6]


def test_recursion_that_is_a_loop():
    text = """
    inline void count(thread int& n, int left) { n += left; if (left > 0) { count(n, left - 1); } }
    kernel void k(device float* o) { int n = 0; count(n, 4); o[0] = n; }"""
    assert floats(text) == [10]


def test_headers_beside_the_source(tmp_path):
    (tmp_path / "add.h").write_text("#pragma once\ninline float add(float a, float b) { return a + b; }\n")
    text = '#include "add.h"\n#include "add.h"\nkernel void k(device float* o) { o[0] = add(1, 2); }'
    assert floats(text, include=[tmp_path]) == [3]


NEWER = {
    "if constexpr": ("kernel void k(device float* o) { if constexpr (sizeof(int) == 4) o[0] = 1; }", "3.2"),
    "lambda": ("kernel void k(device float* o) { auto f = [](float x) { return x + 1; }; o[0] = f(0); }", "3.2"),
    "logging": (
        '#include <metal_logging>\nkernel void k(device float* o) { os_log_default.log("x"); o[0] = 1; }',
        "3.2",
    ),
    "bfloat": ("kernel void k(device float* o) { bfloat b = bfloat(1.0f); o[0] = b; }", "3.1"),
    "its number": ("kernel void k(device float* o) { o[0] = __METAL_VERSION__ == 400; }", "4.0"),
}


@pytest.mark.parametrize(("text", "since"), NEWER.values(), ids=list(NEWER))
def test_versions(text, since):
    assert floats(text, version=since) == [1]
    older = {"3.1": "3.0", "3.2": "3.1"}.get(since)
    if older:
        with pytest.raises(SyntaxError):
            compile_shader(HEADER + text, version=older)


def test_versions_are_named():
    with pytest.raises(ValueError, match=r"version must be one of 3.0, 3.1, 3.2, 4.0, 4.1, got '3'"):
        compile_shader(HEADER, version="3")


STRICT = {
    "bfloat from float": ("void f(float x) { bfloat b = x; }", "explicitly"),
    "bfloat from a function": ("void f(bfloat x) { bfloat b = exp(x); }", "explicitly"),
    "bfloat from max": ("bfloat f(bfloat x) { return max(x, x); }", "explicitly"),
    "program scope": ("float x;", "constant address space"),
    "program scope const": ("const int x = 3;", "constant address space"),
    "program scope array": ("device float x[3];", "constant address space"),
    "positions of other sizes": (
        "kernel void k(device float* o, uint2 p [[thread_position_in_grid]], uint3 n [[threads_per_grid]]) {}",
        "same number of components",
    ),
    "two names of one size": (
        "kernel void k(device float* o, uint a [[threads_per_simdgroup]], uint b [[thread_execution_width]]) {}",
        "one attribute",
    ),
    "kernel calls kernel": (
        "kernel void a(device float* o) { o[0] = 1; } kernel void b(device float* o) { a(o); }",
        "cannot be called",
    ),
    "device object for thread": (
        "struct S { int v; }; int g(const thread S& s) { return s.v; } int f(device S* s) { return g(s[0]); }",
        "no matching function|address space",
    ),
    "acquire order": (
        "void f(device atomic_int* p) { atomic_store_explicit(p, 1, memory_order_acquire); }",
        "no matching function",
    ),
    "threadgroup with a value": ("kernel void k(device float* o) { threadgroup float x = 1; }", "initial value"),
}


@pytest.mark.parametrize(("text", "message"), STRICT.values(), ids=list(STRICT))
def test_refused(text, message):
    with pytest.raises(SyntaxError, match=message) as caught:
        compile_shader(f"{HEADER}\n{text}\nkernel void other(device float* o) {{ o[0] = 1; }}")
    assert "program_source:4" in str(caught.value)


def test_more_threads_than_a_pipeline_has():
    lib = compile_shader(
        HEADER + "[[max_total_threads_per_threadgroup(1025)]] kernel void k(device float* o) { o[0] = 1; }"
    )
    with pytest.raises(RuntimeError, match="1025 threads per threadgroup, the maximum is 1024"):
        lib.k  # noqa: B018


def test_members_of_metal_4_1_take_every_address_space():
    text = "struct S { float v; thread float& at() { return v; } };\nkernel void k(device float* o) { S s; s.at() = 1; o[0] = s.v; }"
    assert floats(text, version="4.0") == [1]
    with pytest.raises(SyntaxError, match=r"address space|thread"):
        compile_shader(HEADER + text, version="4.1")
    assert floats(text.replace("at()", "at() thread", 1), version="4.1") == [1]


WILD = {
    "far before": ("o[0] = x[-1000000000];", r"read of 4 bytes \d+ bytes before device '[ox]'"),
    "minus four": ("o[0] = *(device float*)(ulong)-4;", r"read of 4 bytes at 0xfffffffffffffffc"),
    "null": ("*(device float*)(ulong)(n >> 40) = 1;", r"write of 4 bytes at 0x0"),
    "a wide vector": (
        "*(device long4*)o = ((device long4*)x)[1 << 30];",
        r"access at 0x[0-9a-f]+, where there is no memory",
    ),
    "a local array": (
        "thread float y[4]; for (int i = 0; i < 4; ++i) y[i] = x[i]; thread float* p = y; o[0] = p[n];",
        r"access at 0x[0-9a-f]+, where there is no memory",
    ),
}


@pytest.mark.parametrize(("statement", "message"), WILD.values(), ids=list(WILD))
def test_wild_accesses_are_told_and_survived(statement, message):
    text = f"{HEADER}kernel void k(device float* o, device float* x, constant long& n) {{\n  {statement}\n}}"
    lib = compile_shader(text)
    arguments = (torch.zeros(8), torch.zeros(8), 1 << 33)
    with observe(), pytest.raises(KernelFault, match=message) as caught:
        lib.k(*arguments, threads=1)
    assert [(f.kind, f.line) for f in caught.value.faults] == [("out of bounds", 4)]
    with pytest.raises(RuntimeError, match="where there is no memory; run it inside observe"):
        lib.k(*arguments, threads=1)
    assert floats("kernel void k(device float* o) { o[0] = 1; }") == [1]


LOCKSTEP = """
kernel void k(device float* o, uint i [[thread_index_in_simdgroup]]) {
  threadgroup float s[32];
  s[i] = o[i];
  for (uint n = 1; n < 32; n *= 2) {
    float other = s[i ^ n];
    s[i] += other;
  }
  o[i] = s[i];
}"""


def test_lockstep():
    """A sum over the simdgroup that leaves out its barriers: undefined in Metal, right where lanes advance together."""
    lib = compile_shader(HEADER + LOCKSTEP)
    out = torch.arange(32.0)
    with observe(lockstep=True):
        lib.k(out, threads=32, group_size=32)
    assert out.tolist() == [496.0] * 32
    with observe(), pytest.raises(KernelFault, match="race"):
        lib.k(torch.arange(32.0), threads=32, group_size=32)
    with pytest.raises(ValueError, match="lockstep is an order of its own"), observe(lockstep=True, seed=1):
        pass


def test_lockstep_where_lanes_part():
    text = """
    kernel void k(device float* o, uint i [[thread_index_in_simdgroup]]) {
      threadgroup float s[32];
      s[i] = 0;
      for (uint n = 0; n < i % 4; ++n) s[i] += o[i];
      if (i & 1) s[i] += 100;
      o[i] = s[i ^ 1];
    }"""
    lib = compile_shader(HEADER + text)
    out = torch.ones(32)
    with observe(lockstep=True):
        lib.k(out, threads=32, group_size=32)
    assert out.tolist() == [(i ^ 1) % 4 + 100 * ((i ^ 1) & 1) for i in range(32)]
