"""The face of torch.mps.compile_shader: call forms, limits, errors."""

import pytest
import torch

from metal_host import compile_shader, observe

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


@pytest.fixture(scope="module")
def library():
    return compile_shader(
        HEADER
        + """
    kernel void fill(device float* out, constant float& value, uint i [[thread_position_in_grid]]) { out[i] = value; }
    kernel void longs(device long* out, constant long* values,
        uint i [[thread_position_in_grid]]) { out[i] = values[i]; }
    kernel void floats(device float* out, constant float* values,
        uint i [[thread_position_in_grid]]) { out[i] = values[i]; }
    kernel void bytes(device uchar* out, const device uchar* x, uint i [[thread_position_in_grid]]) { out[i] = x[i]; }
    kernel void shapes(device int* out, uint3 n [[threads_per_grid]], uint3 g [[dispatch_threads_per_threadgroup]]) {
      out[0] = n.x; out[1] = n.y; out[2] = n.z; out[3] = g.x; out[4] = g.y; out[5] = g.z;
    }
    [[max_total_threads_per_threadgroup(64)]] kernel void small(device float* out,
        uint i [[thread_position_in_grid]]) { out[i] = 1; }
    kernel void second(device float* a [[buffer(3)]], device float* b, device float* c [[buffer(0)]]) { a[0] = 1;
        b[0] = 2; c[0] = 3; }
    kernel void sum(device float* out, constant ulong* tensors) {
      out[0] = ((const device float*)tensors[0])[1] + ((const device float*)tensors[1])[0];
    }
    """
    )


def test_the_example_of_the_documentation(device):
    lib = compile_shader(
        "kernel void full(device float* out, constant float& val, uint idx [[thread_position_in_grid]])"
        "{ out[idx] = val; }"
    )
    x = torch.zeros(16, device=device)
    lib.full(x, 3.14)
    assert torch.equal(x.cpu(), torch.full((16,), 3.14))


def test_tensors_are_bound_at_their_storage_offset(library, device):
    x = torch.zeros(10, device=device)
    library.fill(x[3:7], 2.0)
    assert x.tolist() == [0, 0, 0, 2, 2, 2, 2, 0, 0, 0]
    with observe():
        host = torch.zeros(10)
        library.fill(host[3:7], 2.0)
    assert host.tolist() == [0, 0, 0, 2, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64],
)
def test_every_dtype_of_mps_is_passed_as_memory(library, device, dtype):
    x = torch.arange(6, device=device).to(dtype)
    out = torch.zeros_like(x)
    library.bytes(out, x, threads=x.numel() * x.element_size())
    assert torch.equal(out, x)


def test_ints_are_64_bits_and_floats_32(library, device):
    out = torch.zeros(1, dtype=torch.int64, device=device)
    library.longs(out, -(1 << 40))
    assert out.item() == -(1 << 40)
    library.longs(out, True)
    assert out.item() == 1
    out = torch.zeros(1, device=device)
    library.floats(out, 0.1)
    assert out.item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("sequence", [list, tuple])
def test_lists_and_tuples_are_arrays(library, device, sequence):
    out = torch.zeros(3, dtype=torch.int64, device=device)
    library.longs(out, sequence([1, 2, 3]))
    assert out.tolist() == [1, 2, 3]
    out = torch.zeros(3, device=device)
    library.floats(out, sequence([0.5, 1, 2]))
    assert out.tolist() == [0.5, 1, 2]


def test_a_list_of_tensors_is_an_array_of_addresses(library, device):
    a, b = torch.tensor([1.0, 2.0], device=device), torch.tensor([9.0, 40.0], device=device)
    out = torch.zeros(1, device=device)
    library.sum(out, [a, b[1:]], threads=1)
    assert out.item() == 42
    if device == "cpu":
        with observe():
            library.sum(out.zero_(), [a, b[1:]], threads=1)
        assert out.item() == 42


@pytest.mark.parametrize(
    ("cast", "type_", "dtype", "value"),
    [
        ("fp16", "half", torch.float16, 1.5),
        ("bf16", "bfloat", torch.bfloat16, 1.5),
        ("int32", "int", torch.int32, -7),
        ("int16", "short", torch.int16, -7),
        ("int8", "char", torch.int8, -7),
        ("uint8", "uchar", torch.uint8, 200),
    ],
)
def test_arg_casts(device, cast, type_, dtype, value):
    lib = compile_shader(
        f"{HEADER}kernel void k(device {type_}* out, constant {type_}* v, constant {type_}& w)"
        "{ out[0] = v[1]; out[1] = w; }"
    )
    out = torch.zeros(2, dtype=dtype, device=device)
    lib.k(out, [value * 0, value], value, threads=1, arg_casts=cast)
    assert out.tolist() == [value, value]
    out.zero_()
    lib.k(out, [value * 0, value], value, threads=1, arg_casts={1: cast, 2: cast})
    assert out.tolist() == [value, value]


def test_threads_are_totals_and_groups_have_defaults(library, device):
    out = torch.zeros(6, dtype=torch.int32, device=device)
    for given, expected in [
        ({}, [6, 1, 1, 6, 1, 1]),
        ({"threads": 5000}, [5000, 1, 1, 1024, 1, 1]),
        ({"threads": (40, 3)}, [40, 3, 1, 1024, 1, 1]),
        ({"threads": [40, 3, 2], "group_size": [8, 3, 2]}, [40, 3, 2, 8, 3, 2]),
        ({"threads": 40, "group_size": 64}, [40, 1, 1, 64, 1, 1]),
    ]:
        library.shapes(out, **given)
        assert out.tolist() == expected, given


def test_buffers_without_an_index_are_numbered_in_order(library, device):
    a, b, c = torch.zeros(3, 1, device=device)
    unused = torch.zeros(1, device=device)
    library.second(c, b, unused, a, threads=1)  # b takes the first free index, 1
    assert (a.item(), b.item(), c.item()) == (1, 2, 3)


def test_properties(library):
    assert library.small.max_threads_per_threadgroup == 64
    assert library.fill.max_threads_per_threadgroup == 1024
    assert library.fill.thread_execution_width == 32
    assert library.fill.static_thread_group_memory_length == 0
    assert "fill" in dir(library)


X = torch.zeros(4)
ERRORS = {
    "unknown kernel": (lambda lib: lib.missing, RuntimeError, "Failed to create function state object for: missing"),
    "group too large": (
        lambda lib: lib.fill(X, 1.0, threads=4096, group_size=2048),
        ValueError,
        "Threadgroup size exceeds 1024 limit",
    ),
    "group over the kernel's own limit": (lambda lib: lib.small(X, group_size=128), ValueError, "exceeds 64 limit"),
    "3d group too large": (
        lambda lib: lib.fill(X, 1.0, threads=(64, 64, 1), group_size=(64, 64, 1)),
        ValueError,
        "exceeds 1024",
    ),
    "rank of the group": (
        lambda lib: lib.fill(X, 1.0, threads=(4, 1), group_size=4),
        RuntimeError,
        "same number of dimensions",
    ),
    "four dimensions": (lambda lib: lib.fill(X, 1.0, threads=(1, 1, 1, 1)), RuntimeError, "wrong dimension"),
    "no threads": (lambda lib: lib.longs([1], [2]), RuntimeError, "Number of threads is undefined"),
    "zero threads": (lambda lib: lib.fill(X, 1.0, threads=0), ValueError, "positive"),
    "threads of floats": (lambda lib: lib.fill(X, 1.0, threads=4.0), TypeError, "threads must be"),
    "float64": (lambda lib: lib.fill(X.double(), 1.0), TypeError, "float64 is not supported on MPS"),
    "empty list": (lambda lib: lib.longs(X, []), RuntimeError, "Empty list/tuple"),
    "string": (lambda lib: lib.fill(X, "1"), RuntimeError, "Unsupported argument type"),
    "None": (lambda lib: lib.fill(X, None), RuntimeError, "Unsupported argument type"),
    "list of strings": (lambda lib: lib.longs(X, ["1"]), RuntimeError, "Unexpected argument types"),
    "cast": (lambda lib: lib.fill(X, 1.0, arg_casts="fp8"), RuntimeError, "Unsupported cast instruction fp8"),
    "caster": (lambda lib: lib.fill(X, 1.0, arg_casts=3), RuntimeError, "Unexpected caster arg type int"),
    "too many inline bytes": (lambda lib: lib.longs(X, [0] * 513), RuntimeError, "4104 inline bytes"),
    "argument missing": (lambda lib: lib.fill(X), RuntimeError, r"no argument for value \[\[buffer\(1\)\]\]"),
    "32 arguments": (lambda lib: lib.fill(*[X] * 32), RuntimeError, "at most 31 buffers"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=list(ERRORS))
def test_errors(library, call, error, message):
    with pytest.raises(error, match=message):
        call(library)


def test_4096_inline_bytes_pass(library, device):
    out = torch.zeros(512, dtype=torch.int64, device=device)
    library.longs(out, list(range(512)))
    assert out.tolist() == list(range(512))


def test_source_must_be_a_string():
    with pytest.raises(TypeError, match="source must be a str, got bytes"):
        compile_shader(b"kernel void k() {}")


@pytest.mark.parametrize(("floats", "fits"), [(8192, True), (8193, False)])
def test_threadgroup_memory_is_32_kib(floats, fits):
    lib = compile_shader(
        f"{HEADER}kernel void k(device float* o) {{ threadgroup float a[{floats}]; a[0] = 1; o[0] = a[0]; }}"
    )
    if fits:
        assert lib.k.static_thread_group_memory_length == 32768
    else:
        with pytest.raises(RuntimeError, match="uses 32784 bytes of threadgroup memory, the maximum is 32768"):
            lib.k  # noqa: B018


def test_error_buffer(device):
    lib = compile_shader(f"""{HEADER}#include <c10/metal/error.h>
    kernel void k(device float* x, device c10::metal::ErrorMessages* errors, uint i [[thread_position_in_grid]]) {{
      if (x[i] < 0) TORCH_REPORT_ERROR(errors, "negative value at ", long(i));
    }}""")
    x = torch.ones(8, device=device)
    lib.k(x, error_buf_idx=1)
    x[5] = -1
    with pytest.raises(RuntimeError, match="program_source:5: negative value at 5"):
        lib.k(x, error_buf_idx=1)


def test_counters_of_a_launch():
    lib = compile_shader(f"""{HEADER}
    kernel void k(device half* out, const device half* in, constant float& scale, uint i [[thread_position_in_grid]],
        uint t [[thread_index_in_threadgroup]]) {{
      threadgroup float tile[64];
      tile[t] = in[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_barrier(mem_flags::mem_none);
      out[i] = half(exp2(tile[63 - t]) * scale + simd_shuffle_xor(1.0f, 1) + simd_sum(1.0f));
    }}""")
    out, x = torch.zeros(128, dtype=torch.float16), torch.zeros(128, dtype=torch.float16)
    with observe() as launches:
        lib.k(out, x, 2.0, group_size=64)
    counted = launches[0].counters
    expected = {
        "device_bytes_read": 256,
        "device_bytes_written": 256,
        "constant_bytes_read": 512,
        "threadgroup_bytes_read": 512,
        "threadgroup_bytes_written": 512,
        "threadgroup_barriers": 2,
        "simdgroup_barriers": 4,
        "shuffles": 4,
        "reductions": 4,
        "transcendentals": 128,
        "matrix_products": 0,
        "atomics": 0,
    }
    assert {name: counted[name] for name in expected} == expected
    assert launches[0].kernel == "k"


def test_a_compiled_kernel_comes_from_the_cache(tmp_path, monkeypatch):
    from metal_host import toolchain

    monkeypatch.setenv("METAL_HOST_CACHE", str(tmp_path))
    source = f"{HEADER}kernel void cached(device float* o) {{ o[0] = 17; }}"
    compile_shader(source)
    made = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert made

    def no_code(arguments, input=None, real=toolchain.clang):
        assert "-E" in arguments, "a cached kernel was compiled again"
        return real(arguments, input)

    monkeypatch.setattr(toolchain, "clang", no_code)
    out = torch.zeros(1)
    compile_shader(source).cached(out)
    assert out.item() == 17
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == made
