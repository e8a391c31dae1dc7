"""Shuffles, votes, reductions, barriers and matrices of a simdgroup, against their definitions lane by lane."""

import pytest
import torch

from metal_host import compile_shader, observe

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
SHUFFLES = {
    "simd_shuffle(x, ushort((lane * 7 + 3) % 32))": lambda v, i: v[(i * 7 + 3) % 32],
    "simd_broadcast(x, 9)": lambda v, i: v[9],
    "simd_broadcast_first(x)": lambda v, i: v[0],
    "simd_shuffle_xor(x, 11)": lambda v, i: v[i ^ 11],
    "simd_shuffle_up(x, 5)": lambda v, i: v[i - 5] if i >= 5 else v[i],
    "simd_shuffle_down(x, 5)": lambda v, i: v[i + 5] if i < 27 else v[i],
    "simd_shuffle_rotate_up(x, 5)": lambda v, i: v[(i - 5) % 32],
    "simd_shuffle_rotate_down(x, 5)": lambda v, i: v[(i + 5) % 32],
    "simd_shuffle_and_fill_up(x, T(-x), 5)": lambda v, i: v[i - 5] if i >= 5 else -v[i + 27],
    "simd_shuffle_and_fill_down(x, T(-x), 5)": lambda v, i: v[i + 5] if i < 27 else -v[i - 27],
    "simd_shuffle_and_fill_down(x, T(-x), 3, 8)": lambda v, i: v[i + 3] if i % 8 < 5 else -v[i - 5],
    "quad_shuffle(x, 2)": lambda v, i: v[i // 4 * 4 + 2],
    "quad_broadcast(x, 1)": lambda v, i: v[i // 4 * 4 + 1],
    "quad_shuffle_xor(x, 3)": lambda v, i: v[i ^ 3],
    "quad_shuffle_up(x, 1)": lambda v, i: v[i - 1] if i % 4 else v[i],
    "quad_shuffle_down(x, 1)": lambda v, i: v[i + 1] if i % 4 < 3 else v[i],
}
REDUCTIONS = {
    "simd_sum(x)": lambda v, i: sum(v),
    "simd_max(x)": lambda v, i: max(v),
    "simd_min(x)": lambda v, i: min(v),
    "simd_prefix_inclusive_sum(x)": lambda v, i: sum(v[: i + 1]),
    "simd_prefix_exclusive_sum(x)": lambda v, i: sum(v[:i]),
    "quad_sum(x)": lambda v, i: sum(v[i // 4 * 4 : i // 4 * 4 + 4]),
    "quad_max(x)": lambda v, i: max(v[i // 4 * 4 : i // 4 * 4 + 4]),
    "quad_min(x)": lambda v, i: min(v[i // 4 * 4 : i // 4 * 4 + 4]),
}
TYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "int": torch.int32,
    "short": torch.int16,
    "char": torch.int8,
    "float2": torch.float32,
}


@pytest.mark.parametrize("type_", list(TYPES))
def test_shuffles_and_reductions(device, type_):
    calls = {**SHUFFLES, **(REDUCTIONS if type_ not in ("char", "float2") else {})}
    body = "\n".join(f"  out[{i} * 64 + g] = {call};" for i, call in enumerate(calls))
    lib = compile_shader(f"""{HEADER}typedef {type_} T;
    kernel void k(device T* out, const device T* in, uint g [[thread_position_in_grid]],
        uint lane [[thread_index_in_simdgroup]]) {{
      T x = in[g];
    {body}
    }}""")
    width = 2 if type_.endswith("2") else 1
    x = torch.arange(64 * width, device=device).sub(17).mul(5).remainder(23).sub(11).to(TYPES[type_])
    out = torch.zeros(len(calls) * 64 * width, dtype=TYPES[type_], device=device)
    lib.k(out, x, threads=64, group_size=64)
    got = out.view(len(calls), 64, width).cpu()
    values = x.view(64, width).cpu()
    for (call, reference), row in zip(calls.items(), got, strict=True):
        for base in (0, 32):
            for part in range(width):
                lanes = values[base : base + 32, part].tolist()
                expected = [reference(lanes, i) for i in range(32)]
                assert row[base : base + 32, part].tolist() == expected, call


def test_bits_products_and_votes(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device ulong* out, uint g [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
      uint x = 1u << lane, y = ~x;
      bool odd = lane & 1;
      ulong r[14] = {simd_or(x), simd_and(y), simd_xor(lane), simd_product(lane == 3 ? 7u : 1u),
          ulong(simd_ballot(odd)), simd_any(lane == 31),
                     simd_any(lane == 32), simd_all(lane < 32), simd_all(odd), ulong(simd_active_threads_mask()),
                         simd_is_first(),
                     ulong(quad_any(lane == 5)), ulong(quad_all(lane > 3)),
                         simd_prefix_inclusive_product(lane == 2 || lane == 4 ? 3u : 1u)};
      for (int i = 0; i < 14; ++i) out[i * 32 + g] = r[i];
    }"""
    )
    out = torch.zeros(14 * 32, dtype=torch.int64, device=device)
    lib.k(out, threads=32, group_size=32)
    got = out.view(14, 32).cpu().tolist()
    all_of = lambda value: [value] * 32  # noqa: E731
    expected = [all_of(v) for v in (2**32 - 1, 0, 0, 7, 0xAAAAAAAA, 1, 0, 1, 0, 2**32 - 1)]
    expected += [[1] + [0] * 31, [int(4 <= i < 8) for i in range(32)], [int(i > 3) for i in range(32)]]
    expected += [[1, 1, 3, 3] + [9] * 28]
    assert got == expected


def test_reductions_are_over_the_active_lanes(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device float* out, uint lane [[thread_index_in_simdgroup]]) {
      if (lane < 10) out[lane] = simd_sum(1.0f); else out[lane] = simd_sum(2.0f);
      if (lane % 2) out[lane] += simd_max(float(lane));
    }"""
    )
    out = torch.zeros(32, device=device)
    lib.k(out, threads=32, group_size=32)
    assert out.tolist() == [(10.0 if i < 10 else 44.0) + (31 if i % 2 else 0) for i in range(32)]


def test_the_last_simdgroup_may_be_short(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device float* out, uint g [[thread_position_in_grid]], uint n [[threads_per_threadgroup]],
        uint s [[simdgroups_per_threadgroup]]) {
      threadgroup float tile[64];
      tile[g % 50] = simd_sum(1.0f);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[g] = tile[n - 1 - g % 50] * 100 + s;
    }"""
    )
    out = torch.zeros(70, device=device)
    lib.k(out, threads=70, group_size=50)
    first = [1802.0 if i < 18 else 3202.0 for i in range(50)]
    assert out.tolist() == first + [2001.0] * 20


FRAGMENTS = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32}


@pytest.mark.parametrize("accumulator", ["same", "float"])
@pytest.mark.parametrize("type_", list(FRAGMENTS))
def test_matrix_product(device, type_, accumulator):
    out_type = type_ if accumulator == "same" else "float"
    lib = compile_shader(f"""{HEADER}
    kernel void k(device {out_type}* out, const device {type_}* a, const device {type_}* b,
        const device {out_type}* c) {{
      simdgroup_matrix<{type_}, 8, 8> ma, mb;
      simdgroup_matrix<{out_type}, 8, 8> mc, md;
      simdgroup_load(ma, a, 24, ulong2(8, 1));
      simdgroup_load(mb, b, 8, ulong2(0), true);
      simdgroup_load(mc, c);
      simdgroup_multiply_accumulate(md, ma, mb, mc);
      simdgroup_store(md, out, 8, ulong2(0), true);
      simdgroup_multiply(md, ma, mb);
      simdgroup_store(md, out, 16, ulong2(8, 8));
    }}""")
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(s, generator=generator) for s in ((9, 24), (8, 8), (8, 8)))
    a, b, c = a.to(FRAGMENTS[type_]), b.to(FRAGMENTS[type_]), c.to(FRAGMENTS[out_type])
    out = torch.zeros(16 * 16, dtype=FRAGMENTS[out_type], device=device)
    lib.k(out, a.to(device), b.to(device), c.to(device), threads=32, group_size=32)
    out = out.cpu().double()
    product = a[1:9, 8:16].double() @ b.double().T
    tolerance = {"half": 4e-3, "bfloat": 4e-2, "float": 2e-5}[out_type]
    torch.testing.assert_close(out[:64].view(8, 8), (product + c.double()).T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.view(16, 16)[8:, 8:], product, rtol=tolerance, atol=tolerance)


def test_float_products_are_exact_enough_for_fp32(device):
    """A product in tf32 has an error of 1e-3; one in float has not."""
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device float* out, const device float* a, const device float* b) {
      simdgroup_float8x8 ma, mb, mc(0.0f);
      simdgroup_load(ma, a);  simdgroup_load(mb, b);
      simdgroup_multiply_accumulate(mc, ma, mb, mc);
      simdgroup_store(mc, out);
    }"""
    )
    a, b = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(8, 8, device=device)
    lib.k(out, a.to(device), b.to(device), threads=32)
    torch.testing.assert_close(out.cpu().double(), a.double() @ b.double(), rtol=0, atol=1e-5)


def test_matrix_elements_lie_in_apples_lane_order(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device float* out, device float* filled, uint lane [[thread_index_in_simdgroup]]) {
      simdgroup_float8x8 m;
      m.thread_elements()[0] = lane;
      m.thread_elements()[1] = lane + 0.5f;
      simdgroup_store(m, out);
      simdgroup_store(make_filled_simdgroup_matrix<float, 8, 8>(7.0f), filled);
      simdgroup_store(make_diagonal_simdgroup_matrix<float, 8, 8>(3.0f), filled + 64);
    }"""
    )
    out, filled = torch.zeros(8, 8, device=device), torch.zeros(2, 8, 8, device=device)
    lib.k(out, filled, threads=32)
    expected = torch.zeros(8, 8)
    for lane in range(32):  # row bits {4, 2, 1} of the lane, column bits {3, 0} and the element
        row, column = (lane >> 2 & 4) | (lane >> 1 & 3), (lane >> 1 & 4) | (lane & 1) << 1
        expected[row, column], expected[row, column + 1] = lane, lane + 0.5
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(filled.cpu(), torch.stack([torch.full((8, 8), 7.0), 3 * torch.eye(8)]))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_results_do_not_depend_on_the_order_of_threads(seed):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device int* out, uint i [[thread_index_in_threadgroup]]) {
      threadgroup int turn[128];
      turn[i] = i;
      for (int step = 0; step < 5; ++step) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        int next = turn[(i * 37 + 11) % 128] + simd_shuffle_xor(int(i), 3);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        turn[i] = next;
      }
      out[i] = turn[i];
    }"""
    )
    turn = list(range(128))
    for _ in range(5):
        turn = [turn[(i * 37 + 11) % 128] + (i ^ 3) for i in range(128)]
    out = torch.zeros(128, dtype=torch.int32)
    with observe(instrumented=seed % 2 == 1, seed=seed):
        lib.k(out, threads=128, group_size=128)
    assert out.tolist() == turn
