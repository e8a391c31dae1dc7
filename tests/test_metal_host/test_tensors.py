"""Tensors in memory: their interface, as operands of products, loads, stores and reductions of cooperative tensors."""

import itertools

import pytest
import torch

from metal_host import KernelFault, compile_shader, observe

from .test_cooperative_tensors import HEADER, LAYOUTS

SCOPES = {"execution_thread": 1, "execution_simdgroup": 32, "execution_simdgroups<4>": 128}
SEVERAL = [
    "apple10",
    "legacy",
    0,
    1,
    2,
    3,
]  # of both kinds that tensor.c draws, with destinations that add and that do not

# M, N and K are the matrices' sizes; a threadgroup computes a tile of 32 x 32, or what is left of it.
GEMM = (
    HEADER
    + """
template <typename Scope, int K_TILE, bool TA, bool TB, bool COOPERATIVE, bool IN_STEPS>
kernel void gemm(device half* a, device half* b, device float* c, device int* sizes,
                 uint2 group [[threadgroup_position_in_grid]]) {
  const int M = sizes[0], N = sizes[1], K = sizes[2], m = 32 * group.y, n = 32 * group.x;
  constexpr auto descriptor =
      matmul2d_descriptor(32, 32, K_TILE ? K_TILE : static_cast<int>(dynamic_extent), TA, TB, false,
                          IN_STEPS || !COOPERATIVE ? matmul2d_descriptor::mode::multiply_accumulate
                                                   : matmul2d_descriptor::mode::multiply);
  matmul2d<descriptor, Scope> operation;
  tensor<device half, dextents<int, 2>, tensor_inline> A(a, TA ? dextents<int, 2>(M, K) : dextents<int, 2>(K, M));
  auto B = tensor(b, TB ? dextents<int, 2>{K, N} : dextents<int, 2>{N, K}, array<int, 2>{1, TB ? K : N});
  auto C = tensor(c, dextents<int, 2>(N, M)).slice(n, m);
  auto sum = operation.template get_destination_cooperative_tensor<decltype(A), decltype(B), float>();
  for (ushort i = 0; i < sum.get_capacity(); ++i) sum[i] = 0;
  for (int k = 0; k < K; k += IN_STEPS ? K_TILE : K) {
    auto left = A.slice(TA ? m : k, TA ? k : m);
    auto right = B.slice(TB ? k : n, TB ? n : k);
    if (COOPERATIVE)
      operation.run(left, right, sum);
    else
      operation.run(left, right, C);
  }
  if (COOPERATIVE) sum.store(C);
}
"""
)


def instantiate(*cases) -> str:
    lines = []
    for name, arguments in cases:
        values = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in arguments)
        lines.append(
            f'template [[host_name("{name}")]] kernel void gemm<{values}>'
            "(device half*, device half*, device float*, device int*, uint2);"
        )
    return "\n".join(lines)


def check_gemm(kernel, sizes, transpose_left, transpose_right, threads):
    m, n, k = sizes
    g = torch.Generator().manual_seed(m * n * k)
    a, b = torch.randn(m, k, generator=g).half(), torch.randn(k, n, generator=g).half()
    stored = [(x.T if transposed else x).contiguous() for x, transposed in ((a, transpose_left), (b, transpose_right))]
    c = torch.zeros(m, n)
    groups = (-(-n // 32), -(-m // 32))
    sizes = torch.tensor(sizes, dtype=torch.int32)
    kernel(*stored, c, sizes, threads=(threads * groups[0], groups[1], 1), group_size=(threads, 1, 1))
    expected = a.double() @ b.double()
    assert (c.double() - expected).abs().max() < 1e-6 * k


CASES = [
    ("whole", ("execution_simdgroup", 0, False, True, True, False)),
    ("memory", ("execution_simdgroup", 0, True, False, False, False)),
    ("steps", ("execution_simdgroups<4>", 16, False, False, True, True)),
    ("thread", ("execution_thread", 0, True, True, True, False)),
]
RAGGED = [(32, 32, 32), (40, 21, 50)]


def test_products_of_tensors_in_memory():
    with observe() as launches:
        lib = compile_shader(GEMM + instantiate(*CASES), version="4.0")
        kernels = {name: getattr(lib, name) for name, _ in CASES}
    for layout, (name, case), sizes in itertools.product(SEVERAL, CASES, RAGGED):
        with observe(layout=layout) as launches:
            check_gemm(kernels[name], sizes, case[2], case[3], SCOPES[case[0]])
        if name == "whole" and sizes == (32, 32, 32):
            assert launches[0].counters["device_bytes_read"] - 3 * 4 * 32 == 2 * 2 * 32 * 32  # each element once
            assert launches[0].counters["device_bytes_written"] == 4 * 32 * 32


@pytest.mark.metal_full
@pytest.mark.parametrize("scope", SCOPES)
def test_products_of_tensors_in_memory_in_every_form(scope):
    forms = list(itertools.product((0, 16), (False, True), (False, True), (False, True), (False, True)))
    cases = [(f"p{i}", (scope, *form)) for i, form in enumerate(forms) if form[0] or not form[4]]
    lib = compile_shader(GEMM + instantiate(*cases), version="4.0")
    for (name, case), layout, sizes in itertools.product(cases, LAYOUTS, RAGGED):
        if case[1] and not case[5]:
            sizes = (*sizes[:2], 16)  # a static inner dimension is what one run multiplies
        with observe(instrumented=False, layout=layout):
            check_gemm(getattr(lib, name), sizes, case[2], case[3], SCOPES[scope])


SOFTMAX = (
    HEADER
    + """
// Each row's softmax of a b^T, and the columns' sums of that; P goes through registers if it may.
kernel void softmax(device half* a, device half* b, device half* v, device float* out, device float* columns, device int* path) {
  constexpr auto scores = matmul2d_descriptor(16, 32, 32, false, true);
  matmul2d<scores, execution_simdgroup> first;
  constexpr auto values = matmul2d_descriptor(16, 32, 32);
  matmul2d<values, execution_simdgroup> second;
  auto A = tensor(a, extents<int, 32, 16>());
  auto B = tensor(b, extents<int, 32, 32>()), V = tensor(v, extents<int, 32, 32>());
  auto S = first.get_destination_cooperative_tensor<decltype(A), decltype(B), half>();
  first.run(A, B, S);
  auto largest = first.get_row_reduction_destination_cooperative_tensor<decltype(A), decltype(B), half>();
  auto total = largest;
  auto column = first.get_column_reduction_destination_cooperative_tensor<decltype(A), decltype(B), half>();
  reduce_rows(S, largest, reduction_operation::max, half(-INFINITY));
  threadgroup half staged[16 * 32], row[16];
  const bool mapped = is_iterator_compatible(S, largest);
  auto Row = tensor(&row[0], dextents<int, 1>(16));
  largest.store(Row);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (auto it = S.begin(); it != S.end(); it++) {
    if (*it != *it) continue;  // a slot without an element
    auto at = S.get_multidimensional_index(it);
    *it = exp(*it - (mapped ? *largest.map_iterator(it) : row[at[1]]));
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  reduce_rows(S, total);
  total.store(Row);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (ushort i = 0; i < S.get_capacity(); ++i)
    if (S.is_valid_element(i)) S[i] /= row[S.get_multidimensional_index(i)[1]];
  reduce_columns(S, column);
  for (ushort i = 0; i < column.get_capacity(); ++i)
    if (column.is_valid_element(i)) columns[column.get_multidimensional_index(i)[0]] = column[i];
  auto O = second.get_destination_cooperative_tensor<decltype(A), decltype(V), float>();
  auto Out = tensor(out, extents<int, 32, 16>());
  const bool compatible = second.is_compatible_as_left_input<half, half, float>(S);
  if (compatible) {
    auto P = second.get_left_input_cooperative_tensor<half, half, float>(S);
    second.run(P, V, O);
  } else {
    auto Staged = tensor(&staged[0], extents<int, 32, 16>());
    S.store(Staged);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    second.run(Staged, V, O);
  }
  O.store(Out);
  path[0] = mapped, path[1] = compatible;
}
"""
)


def test_reductions_and_maps_between_layouts():
    with observe():
        kernel = compile_shader(SOFTMAX, version="4.0").softmax
    g = torch.Generator().manual_seed(0)
    a, b, v = (torch.randn(*shape, generator=g).half() for shape in ((16, 32), (32, 32), (32, 32)))
    p = (a.double() @ b.double().T).softmax(-1)
    paths = set()
    for layout in LAYOUTS:
        out, columns, path = torch.zeros(16, 32), torch.zeros(32), torch.zeros(2, dtype=torch.int32)
        with observe(layout=layout):
            kernel(a, b, v, out, columns, path, threads=32, group_size=32)
        assert (out.double() - p @ v.double()).abs().max() < 5e-3, layout
        assert (columns.double() - p.sum(0)).abs().max() < 5e-3, layout
        paths.add((layout in ("apple10", "legacy"), *path.tolist()))
    assert paths == {(True, 1, 1), (False, 1, 1), (False, 0, 0)}  # both kinds of layouts were drawn


VIEWS = (
    HEADER
    + """
kernel void views(device float* x, device float* out, device int* shape) {
  auto T = tensor(x, dextents<int, 2>{5, 4});  // 5 columns
  auto S = T.slice<2, dynamic_extent>(3, 1);
  tensor<device float, extents<int, 3, 2>, tensor_inline> strided(x + 1, extents<int, 3, 2>(), array<int, 2>{1, 10});
  shape[0] = S.get_extent(0), shape[1] = S.get_extent(1), shape[2] = S.get_stride(1), shape[3] = T.get_stride(1);
  shape[4] = int(S.get_static_extent(0)), shape[5] = S.get_static_extent(1) == dynamic_extent, shape[6] = int(T.get_rank());
  out[0] = S[array<int, 2>{1, 2}];
  out[1] = S.load(0, 0);
  out[2] = S.load(2, 0);  // outside: 0
  out[3] = strided.load(2, 1);
  S.store(-1.0f, 1, 0);
  S.store(-2.0f, 0, 3);  // outside: dropped
  T.slice(0, 3).store(-3.0f, 4, 0);
}
kernel void broadcast(device float* row, device float* out) {
  constexpr auto descriptor = matmul2d_descriptor(16, 32);
  matmul2d<descriptor, execution_simdgroup> operation;
  auto Row = tensor(row, extents<int, 32, 1>());
  auto Out = tensor(out, dextents<int, 2>(32, 10), array<int, 2>{1, 32});
  auto C = operation.get_destination_cooperative_tensor<decltype(Row), decltype(Row), float>();
  C.load(Row);
  C.store(Out);
}
"""
)


def test_the_interface_of_tensors():
    with observe():
        lib = compile_shader(VIEWS, version="4.0")
        x, out, shape = torch.arange(20.0), torch.full((4,), 9.0), torch.zeros(7, dtype=torch.int32)
        lib.views(x, out, shape, threads=1)
    assert shape.tolist() == [2, 3, 5, 5, 2, 1, 2]
    assert out.tolist() == [19.0, 8.0, 0.0, 13.0]
    assert {i for i in range(20) if x[i] != i} == {9, 19} and (x[9], x[19]) == (-1, -3)
    for layout in SEVERAL:
        row, out = torch.randn(32), torch.zeros(16, 32)
        with observe(layout=layout):
            lib.broadcast(row, out, threads=32, group_size=32)
        assert torch.equal(out[:10], row.expand(10, 32)) and not out[10:].any()


def test_relaxed_precision_loses_bits_of_floats():
    source = GEMM.replace("device half", "device float").replace("TB, false,", "TB, RELAXED,")
    case = ("p", ("execution_simdgroup", 0, False, False, True, False))
    errors = []
    for relaxed in ("false", "true"):
        text = source.replace("RELAXED", relaxed) + instantiate(case).replace("device half", "device float")
        lib = compile_shader(text, version="4.0")
        a, b, c = torch.randn(32, 64), torch.randn(64, 32), torch.zeros(32, 32)
        lib.p(a, b, c, torch.tensor([32, 32, 64], dtype=torch.int32), threads=(32, 1, 1), group_size=(32, 1, 1))
        errors.append((c.double() - a.double() @ b.double()).abs().max().item())
    assert errors[0] < 1e-4 and 1e-3 < errors[1] < 1e-1


@pytest.mark.parametrize(
    "wrong",
    [
        ("an index outside", "out[0] = S[array<int, 2>{1, 2}];", "out[0] = S[array<int, 2>{2, 2}];"),
        ("a slice that sticks out", "T.slice<2, dynamic_extent>(3, 1)", "T.slice<2, dynamic_extent>(4, 1)"),
    ],
    ids=lambda wrong: wrong[0],
)
def test_what_lies_outside_a_tensor_is_a_fault(wrong):
    source = VIEWS.replace(*wrong[1:])
    line = next(i for i, text in enumerate(source.split("\n"), 1) if wrong[2] in text)
    with observe(), pytest.raises(KernelFault) as caught:
        compile_shader(source, version="4.0", kernels=["views"]).views(
            torch.arange(30.0), torch.zeros(4), torch.zeros(7, dtype=torch.int32), threads=1
        )
    assert [(fault.kind, fault.line) for fault in caught.value.faults] == [("extents", line)]
