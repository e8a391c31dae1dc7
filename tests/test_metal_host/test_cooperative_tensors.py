"""MetalPerformancePrimitives: products of cooperative tensors under every layout, against float64."""

import itertools

import pytest
import torch

from metal_host import KernelFault, compile_shader, observe

HEADER = """#include <metal_stdlib>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;
"""
LAYOUTS = ["apple10", "legacy", *range(20)]

# Every element is asked for its place; what has none is left alone.
PRODUCT = (
    HEADER
    + """
template <typename Tensor, typename P> void fill(thread Tensor& tensor, P from, int stride) {
  for (ushort i = 0; i < tensor.get_capacity(); ++i) {
    if (!tensor.is_valid_element(i)) continue;
    auto at = tensor.get_multidimensional_index(i);
    tensor[i] = from[at[1] * stride + at[0]];
  }
}
template <typename Tensor, typename P> void spill(thread Tensor& tensor, P to, int stride) {
  for (ushort i = 0; i < tensor.get_capacity(); ++i) {
    if (!tensor.is_valid_element(i)) continue;
    auto at = tensor.get_multidimensional_index(i);
    to[at[1] * stride + at[0]] = tensor[i];
  }
}
template <int M, int N, int K, bool TA, bool TB, bool ADD, typename A, typename B, typename C>
kernel void product(device A* a, device B* b, device C* c) {
  constexpr auto descriptor = matmul2d_descriptor(
      M, N, K, TA, TB, false, ADD ? matmul2d_descriptor::mode::multiply_accumulate : matmul2d_descriptor::mode::multiply);
  matmul2d<descriptor, execution_simdgroup> operation;
  auto left = operation.template get_left_input_cooperative_tensor<A, B, C>();
  auto right = operation.template get_right_input_cooperative_tensor<A, B, C>();
  auto sum = operation.template get_destination_cooperative_tensor<decltype(left), decltype(right), C>();
  fill(left, a, TA ? M : K);
  fill(right, b, TB ? K : N);
  if (ADD) fill(sum, c, N);
  operation.run(left, right, sum);
  spill(sum, c, N);
}
"""
)
TYPES = {
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "float": torch.float32,
    "char": torch.int8,
    "int": torch.int32,
}
TYPES["uchar"] = torch.uint8
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.int32: 0.0}


def instantiate(*cases: tuple) -> str:
    lines = []
    for name, arguments, (a, b, c) in cases:
        values = ", ".join(str(v).lower() for v in arguments)
        lines.append(
            f'template [[host_name("{name}")]] kernel void product<{values}, {a}, {b}, {c}>(device {a}*, device {b}*, device {c}*);'
        )
    return "\n".join(lines)


def data(rows: int, columns: int, name: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if TYPES[name].is_floating_point:
        return torch.randn(rows, columns, generator=g).to(TYPES[name])
    low = 0 if name == "uchar" else -100
    return torch.randint(low, 100, (rows, columns), generator=g).to(TYPES[name])


def check_product(kernel, shape, types, layout):
    (m, n, k, transpose_left, transpose_right, add), (a_type, b_type, c_type) = shape, types
    a, b, c = data(m, k, a_type, 1), data(k, n, b_type, 2), data(m, n, c_type, 3)
    expected = a.double() @ b.double() + (c.double() if add else 0)
    stored = [(x.T if transposed else x).contiguous() for x, transposed in ((a, transpose_left), (b, transpose_right))]
    kernel(*stored, c, threads=32, group_size=32)
    bound = ROUNDING[TYPES[c_type]] * expected.abs().max().item()
    assert (c.double() - expected).abs().max().item() <= bound, (shape, types, layout)


SIZES = [(16, 32, 16), (32, 32, 32), (32, 16, 32)]
SHAPES = [(*size, *flags) for size in SIZES for flags in itertools.product((False, True), repeat=3)]


@pytest.mark.metal_full
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_shape_under_every_layout(size):
    shapes = [s for s in SHAPES if s[:3] == size]
    lib = compile_shader(
        PRODUCT + instantiate(*((f"p{i}", s, ("half", "half", "float")) for i, s in enumerate(shapes))), version="4.0"
    )
    for layout, (i, shape) in itertools.product(LAYOUTS, enumerate(shapes)):
        with observe(layout=layout):
            check_product(getattr(lib, f"p{i}"), shape, ("half", "half", "float"), layout)


@pytest.mark.parametrize("instrumented", [False, True])
def test_a_product_is_right_under_every_layout(instrumented):
    shape, types = (16, 32, 16, False, True, True), ("float", "bfloat", "float")
    with observe(instrumented=instrumented) as launches:
        lib = compile_shader(PRODUCT + instantiate(("p", shape, types)), version="4.0")
        kernel = lib.p
    for layout in LAYOUTS:
        with observe(instrumented=instrumented, layout=layout) as launches:
            check_product(kernel, shape, types, layout)
        assert launches[0].counters["matrix_products"] == 16 * 32 * 16 // 512  # counted as 8x8x8


DOCUMENTED = {
    "int": ["char char", "uchar uchar"],
    "half": ["half half", "half char", "half uchar", "char half", "uchar half", "half bfloat", "bfloat half"],
    "bfloat": [
        *("bfloat bfloat", "bfloat char", "bfloat uchar", "char bfloat", "uchar bfloat", "half bfloat", "bfloat half"),
    ],
    "float": [
        f"{a} {b}"
        for a, b in itertools.product(["half", "bfloat", "float", "char", "uchar"], repeat=2)
        if not {a, b} <= {"char", "uchar"}
    ],
}


def types_refused(types: tuple[str, str, str]) -> bool:
    try:
        _ = compile_shader(PRODUCT + instantiate(("p", (16, 32, 16, False, False, True), types)), version="4.0").p
    except SyntaxError as error:
        assert "no such combination of element types" in str(error)
        return True
    return False


@pytest.mark.metal_full
def test_documented_types_and_no_others():
    for types in itertools.product(TYPES, repeat=3):
        documented = f"{types[0]} {types[1]}" in DOCUMENTED.get(types[2], [])
        assert types_refused(types) != documented, types


@pytest.mark.metal_full
@pytest.mark.parametrize("c", DOCUMENTED)
def test_products_of_every_type(c):
    pairs = [tuple(pair.split()) for pair in DOCUMENTED[c]]
    shape = (16, 32, 16, False, False, True)
    cases = [(f"p{i}", shape, (*pair, c)) for i, pair in enumerate(pairs)]
    lib = compile_shader(PRODUCT + instantiate(*cases), version="4.0")
    for name, _, types in cases:
        for layout in ("apple10", 7):
            with observe(instrumented=False, layout=layout):
                check_product(getattr(lib, name), shape, types, layout)


APPLE10 = """
kernel void places(device int* out, uint lane [[thread_index_in_simdgroup]]) {
  constexpr auto descriptor = matmul2d_descriptor(16, 32, 16, false, TB, true);
  matmul2d<descriptor, execution_simdgroup> operation;
  auto left = operation.get_left_input_cooperative_tensor<half, half, float>();
  auto right = operation.get_right_input_cooperative_tensor<half, half, float>();
  auto sum = operation.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  for (int i = 0; i < 16; ++i) {
    auto a = left.get_multidimensional_index(i % 8), b = right.get_multidimensional_index(i), d = sum.get_multidimensional_index(i);
    device int* to = out + (lane * 16 + i) * 6;
    to[0] = a[0], to[1] = a[1], to[2] = b[0], to[3] = b[1], to[4] = d[0], to[5] = d[1];
  }
}
"""


def expected_places(layout: str, transposed: bool, lane: int, i: int) -> list[int]:
    """The element's (column, row) as it is stored, of left, right and destination of a 16x32x16 product.

    apple10: measured by MNN on an M5, and what MLX's NAX kernels count on. legacy: what torch's MppAttention.h counts on.
    """
    bits = [lane >> b & 1 for b in range(5)]
    down, right, j = bits[4] * 4 + bits[2] * 2 + bits[1], bits[3] * 2 + bits[0], i % 8
    if layout == "apple10":
        a = [right * 4 + j % 4, down + j // 4 * 8]
        d = [right * 4 + i % 4 + i // 8 * 16, down + i // 4 % 2 * 8]
        b = [right * 4 + i % 4, down + i // 4 % 2 * 8 + i // 8 * 16] if transposed else d
    else:
        a = [right * 2 + j % 2 + j // 2 % 2 * 8, down + j // 4 * 8]
        d = [right * 2 + i % 2 + i // 2 % 4 * 8, down + i // 8 * 8]
        b = d[::-1] if transposed else d
    return a + b + d


@pytest.mark.parametrize("transposed", [False, True])
def test_the_known_layouts(transposed):
    with observe(instrumented=False):
        lib = compile_shader(HEADER + APPLE10.replace("TB", str(transposed).lower()), version="4.0")
    for layout in ("apple10", "legacy"):
        out = torch.zeros(32, 16, 6, dtype=torch.int32)
        with observe(instrumented=False, layout=layout):
            lib.places(out, threads=32, group_size=32)
        expected = [[expected_places(layout, transposed, lane, i) for i in range(16)] for lane in range(32)]
        assert out.tolist() == expected


def test_the_variable_chooses_the_layout(monkeypatch):
    lib = compile_shader(HEADER + APPLE10.replace("TB", "false"), version="4.0")
    found = []
    for layout in ("apple10", "legacy", "3"):
        monkeypatch.setenv("METAL_HOST_LAYOUT", layout)
        out = torch.zeros(32, 16, 6, dtype=torch.int32)
        lib.places(out, threads=32, group_size=32)
        found.append(out.tolist())
    assert found[0] != found[1] != found[2] != found[0]
    with pytest.raises(ValueError, match="'apple10', 'legacy' or a seed"), observe(layout="apple9"):
        pass


def test_the_headers_are_empty_below_metal_4():
    source = HEADER.replace("using namespace mpp::tensor_ops;", "") + "kernel void k(device int* x) { x[0] = MPP; }"
    with pytest.raises(SyntaxError, match="mpp"):
        compile_shader(source.replace("MPP", "mpp::tensor_ops::matmul2d_descriptor(16, 32).m"), version="3.2")
    compile_shader(source.replace("MPP", "mpp::tensor_ops::matmul2d_descriptor(16, 32).m"), version="4.0")
    defined = "\n#ifdef __HAVE_TENSOR__\n#error tensors\n#endif\n"
    compile_shader(source.replace("MPP", "1") + defined, version="3.2")
    with pytest.raises(SyntaxError, match="tensors"):
        compile_shader(source.replace("MPP", "1") + defined, version="4.0")


def test_what_is_not_written_is_nan():
    source = PRODUCT.replace("if (ADD) fill(sum, c, N);", "")
    shape, types = (16, 32, 16, False, False, True), ("half", "half", "float")
    lib = compile_shader(source + instantiate(("p", shape, types)), version="4.0")
    a, b, c = data(16, 16, "half", 1), data(16, 32, "half", 2), torch.zeros(16, 32)
    lib.p(a, b, c, threads=32, group_size=32)
    assert c.isnan().all()


def test_padding_is_nan_again_after_a_product():
    source = PRODUCT.replace("spill(sum, c, N);", "c[0] = sum[sum.get_capacity() - 1];").replace(
        "device C* c)", "device C* c, uint lane [[thread_index_in_simdgroup]])"
    )
    source = source.replace("c[0] =", "c[lane] = sum.is_valid_element(sum.get_capacity() - 1) ? 1 :")
    shape, types = (16, 32, 16, False, False, False), ("half", "half", "float")
    instance = instantiate(("p", shape, types)).replace("device float*)", "device float*, uint)")
    lib = compile_shader(source + instance, version="4.0")
    seen = torch.zeros(32, 32)
    with observe(instrumented=False, layout=5):
        lib.p(data(16, 16, "half", 1), data(16, 32, "half", 2), seen, threads=32, group_size=32)
    assert seen[0].isnan().any() and (seen[0] == 1).any()


def test_a_slot_beyond_the_capacity_is_a_fault():
    source = PRODUCT.replace("operation.run", "sum[sum.get_capacity()] = 0; operation.run")
    line = next(i for i, text in enumerate(source.split("\n"), 1) if "sum[sum.get_capacity()]" in text)
    shape, types = (16, 32, 16, False, False, False), ("half", "half", "float")
    with observe(), pytest.raises(KernelFault) as caught:
        lib = compile_shader(source + instantiate(("p", shape, types)), version="4.0")
        lib.p(data(16, 16, "half", 1), data(16, 32, "half", 2), torch.zeros(16, 32), threads=32, group_size=32)
    (fault,) = caught.value.faults
    assert (fault.kind, fault.line) == ("index", line) and "capacity is 16" in fault.message
