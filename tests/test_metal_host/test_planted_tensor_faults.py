"""Faults planted in an attention kernel on cooperative tensors: each must be refused by the compiler, reported at its line, or
make the numbers wrong; the kernel as it is must be clean and right under every layout."""

import math

import pytest
import torch

from metal_host import KernelFault, compile_shader, observe

from .test_cooperative_tensors import HEADER, LAYOUTS
from .test_planted_faults import Plant, line_of, replaced

# Two simdgroups of 16 queries each; blocks of 32 keys; P goes through threadgroup memory, which every layout can.
ATTENTION = (
    HEADER
    + """
constant constexpr int D = 32, KEYS = 32, ROWS = 16;
kernel void attention(device half* q, device half* k, device half* v, device float* out, device int* lengths,
                      uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int queries = lengths[0], keys = lengths[1], first = simdgroup * ROWS;
  constexpr auto scores = matmul2d_descriptor(ROWS, KEYS, D, false, true, false, matmul2d_descriptor::mode::multiply);
  constexpr auto values =
      matmul2d_descriptor(ROWS, D, KEYS, false, false, false, matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<scores, execution_simdgroup> qk;
  matmul2d<values, execution_simdgroup> pv;
  threadgroup half staged[2][ROWS * KEYS];
  threadgroup float largest[2][ROWS], total[2][ROWS], factor[2][ROWS];
  auto Q = tensor(q, dextents<int, 2>(D, queries)).slice(0, first);
  auto K = tensor(k, dextents<int, 2>(D, keys));
  auto V = tensor(v, dextents<int, 2>(D, keys));
  auto P = tensor(&staged[simdgroup][0], extents<int, KEYS, ROWS>());
  auto S = qk.get_destination_cooperative_tensor<decltype(Q), decltype(K), float>();
  auto O = pv.get_destination_cooperative_tensor<decltype(P), decltype(V), float>();
  auto row = qk.get_row_reduction_destination_cooperative_tensor<decltype(Q), decltype(K), float>();
  auto right = qk.get_right_input_cooperative_tensor<half, half, float>();
  for (ushort i = 0; i < O.get_capacity(); ++i) O[i] = 0;
  if (lane < ROWS) largest[simdgroup][lane] = -INFINITY, total[simdgroup][lane] = 0;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int key = 0; key < keys; key += KEYS) {
    for (ushort i = 0; i < right.get_capacity(); ++i) {
      if (!right.is_valid_element(i)) continue;
      auto at = right.get_multidimensional_index(i);
      right[i] = key + at[1] < keys ? k[(key + at[1]) * D + at[0]] : half(0);
    }
    qk.run(Q, right, S);
    for (ushort i = 0; i < S.get_capacity(); ++i) {
      if (!S.is_valid_element(i)) continue;
      auto at = S.get_multidimensional_index(i);
      S[i] = key + at[0] < keys ? S[i] * 0.1767767f - 300.0f : -INFINITY;
    }
    reduce_rows(S, row, reduction_operation::max, -INFINITY);
    for (ushort i = 0; i < row.get_capacity(); ++i) {
      if (!row.is_valid_element(i)) continue;
      factor[simdgroup][row.get_multidimensional_index(i)[0]] = row[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (lane < ROWS) {
      const float before = largest[simdgroup][lane], now = max(before, factor[simdgroup][lane]);
      largest[simdgroup][lane] = now, factor[simdgroup][lane] = exp(before - now);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (ushort i = 0; i < S.get_capacity(); ++i)
      if (S.is_valid_element(i)) S[i] = exp(S[i] - largest[simdgroup][S.get_multidimensional_index(i)[1]]);
    for (ushort i = 0; i < S.get_capacity(); ++i) {
      if (!S.is_valid_element(i)) continue;
      auto at = S.get_multidimensional_index(i);
      staged[simdgroup][at[1] * KEYS + at[0]] = half(S[i]);
    }
    reduce_rows(S, row);
    for (ushort i = 0; i < row.get_capacity(); ++i) {
      if (!row.is_valid_element(i)) continue;
      const int r = row.get_multidimensional_index(i)[0];
      row[i] += total[simdgroup][r] * factor[simdgroup][r];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (ushort i = 0; i < row.get_capacity(); ++i)
      if (row.is_valid_element(i)) total[simdgroup][row.get_multidimensional_index(i)[0]] = row[i];
    for (ushort i = 0; i < O.get_capacity(); ++i)
      if (O.is_valid_element(i)) O[i] *= factor[simdgroup][O.get_multidimensional_index(i)[1]];
    auto part = V.slice(0, key);
    pv.run(P, part, O);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (ushort i = 0; i < O.get_capacity(); ++i) {
    if (!O.is_valid_element(i)) continue;
    auto at = O.get_multidimensional_index(i);
    if (first + at[1] < queries) out[(first + at[1]) * D + at[0]] = O[i] / total[simdgroup][at[1]];
  }
}
"""
)

FAULTS = [
    # places and layouts
    Plant(
        "column and row swapped",
        "staged[simdgroup][at[1] * KEYS + at[0]]",
        "staged[simdgroup][(at[0] * KEYS + at[1]) % 512]",
        "race|result",
    ),
    Plant(
        "the map of another layout",
        "right[i] = key + at[1] < keys ? k[(key + at[1]) * D + at[0]] : half(0);",
        "const int fm = (lane >> 2 & 4) | (lane >> 1 & 3), fn = ((lane >> 2 & 2) | (lane & 1)) * 4;"
        " const int n = fm + i / 4 % 2 * 8 + i / 16 * 16, c = fn + i % 4 + i / 8 % 2 * 16;"
        " right[i] = key + n < keys ? k[(key + n) * D + c] : half(0);",
        "result",
    ),
    Plant("padding taken for elements", "if (row.is_valid_element(i)) total", "total", "index"),
    Plant(
        "a slot beyond the capacity",
        "i < O.get_capacity(); ++i) O[i] = 0;",
        "i <= O.get_capacity(); ++i) O[i] = 0;",
        "index",
    ),
    Plant(
        "a destination taken for an operand",
        "qk.run(Q, right, S);",
        "auto other = pv.get_left_input_cooperative_tensor<float, half, float>(S); qk.run(Q, right, S); S[0] = other[0];",
        "layout",
    ),
    # what is not there
    Plant("accumulator not zeroed", "++i) O[i] = 0;", "++i) {}", "result"),
    Plant("operand not filled", "right[i] = key +", "if (lane) right[i] = key +", "result"),
    Plant("identity left out", "reduction_operation::max, -INFINITY)", "reduction_operation::max)", "result"),
    Plant(
        "identity of a minimum", "reduction_operation::max, -INFINITY)", "reduction_operation::max, INFINITY)", "result"
    ),
    # extents and bounds
    Plant(
        "extents of whole tiles",
        "tensor(v, dextents<int, 2>(D, keys))",
        "tensor(v, dextents<int, 2>(D, keys + KEYS))",
        "out of bounds",
        "pv.run(P, part",
    ),
    Plant("static extents past the end", "V.slice(0, key)", "V.slice<D, KEYS>(0, key)", "extents"),
    Plant(
        "static extents smaller than the tile",
        "extents<int, KEYS, ROWS>()",
        "extents<int, KEYS / 2, ROWS>()",
        "compiler",
        "pv.run(P, part",
    ),
    Plant(
        "the row of another tensor",
        "tensor(q, dextents<int, 2>(D, queries)).slice(0, first)",
        "tensor(q + first * D, dextents<int, 2>(D, queries))",
        "out of bounds",
        "qk.run(Q, right",
    ),
    # types
    Plant("an accumulator of another type", "decltype(V), float>()", "decltype(V), int>()", "compiler"),
    Plant(
        "operands of another type",
        "qk.get_right_input_cooperative_tensor<half, half, float>()",
        "qk.get_right_input_cooperative_tensor<bfloat, half, float>()",
        "compiler",
        "qk.run(Q, right",
    ),
    Plant("the operand of another operation", "pv.run(P, part, O)", "pv.run(P, part, S)", "compiler"),
    Plant(
        "const elements",
        "auto Q = tensor(q,",
        "auto Q = tensor((const device half*)q,",
        "compiler",
        "qk.get_destination",
    ),
    Plant(
        "an inner dimension that is dynamic",
        "matmul2d_descriptor(ROWS, KEYS, D, false,",
        "matmul2d_descriptor(ROWS, KEYS, static_cast<int>(dynamic_extent), false,",
        "compiler",
        "get_right_input",
    ),
    Plant(
        "a cooperative operand of two simdgroups",
        "matmul2d<scores, execution_simdgroup>",
        "matmul2d<scores, execution_simdgroups<2>>",
        "compiler",
        "get_right_input",
    ),
    Plant("reduction by columns into rows", "reduce_rows(S, row);", "reduce_columns(S, row);", "compiler"),
    # scopes and order
    Plant(
        "product under a branch",
        "qk.run(Q, right, S);",
        "if (lane < 31) qk.run(Q, right, S);",
        "divergent simdgroup operation",
    ),
    Plant(
        "reduction under a branch",
        "reduce_rows(S, row);",
        "if (S[0] > 0.5f) reduce_rows(S, row);",
        "divergent simdgroup operation",
    ),
    Plant(
        "a scope of more simdgroups than there are",
        "matmul2d<values, execution_simdgroup>",
        "matmul2d<values, execution_simdgroups<4>>",
        "scope",
        "pv.run(P, part",
    ),
    Plant(
        "product of the threadgroup under a branch",
        "pv.run(P, part, O);",
        "matmul2d<values, execution_simdgroups<2>> both; auto sum = both.get_destination_cooperative_tensor<decltype(P), decltype(V), float>(); if (simdgroup == 0) both.run(P, part, sum);",
        "divergent barrier",
    ),
    Plant(
        "no barrier before the product",
        "    simdgroup_barrier(mem_flags::mem_threadgroup);\n    for (ushort i = 0; i < row.get_capacity(); ++i)\n",
        "    for (ushort i = 0; i < row.get_capacity(); ++i)\n",
        "race",
        "pv.run(P, part",
    ),
    Plant(
        "no barrier after the product",
        "    pv.run(P, part, O);\n    simdgroup_barrier(mem_flags::mem_threadgroup);\n",
        "    pv.run(P, part, O);\n",
        "race",
        "factor[simdgroup][row.get",
    ),
]


def run(source: str, layout="apple10", instrumented: bool = True) -> float:
    """The largest error against float64."""
    queries, keys, d = 27, 50, 32
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, d, generator=g).half() for n in (queries, keys, keys))
    out = torch.full((queries, d), math.nan)
    with observe(instrumented=instrumented, layout=layout):
        kernel = compile_shader(source, version="4.0").attention
        kernel(q, k, v, out, torch.tensor([queries, keys], dtype=torch.int32), threads=64, group_size=64)
    expected = (q.double() @ k.double().T / math.sqrt(d)).softmax(-1) @ v.double()
    return (out.double() - expected).abs().max().item()


def test_the_kernel_is_clean_under_every_layout():
    for layout in LAYOUTS:
        assert run(ATTENTION, layout) < 1e-3, layout


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.name)
def test_planted(plant):
    source = replaced(ATTENTION, plant)
    lines = line_of(source, plant.seen_at or plant.new.strip().split("\n")[0])
    if plant.kind == "compiler":
        with pytest.raises(SyntaxError) as caught:
            run(source)
        assert any(f"program_source:{line}:" in str(caught.value) for line in lines), str(caught.value)
        return
    try:
        error = run(source, layout=6)  # drawn, with padding and with operands placed unlike destinations
    except KernelFault as caught:
        assert any(fault.kind in plant.kind.split("|") and fault.line in lines for fault in caught.faults), caught
    else:
        assert "result" in plant.kind.split("|") and not error < 0.05, error
