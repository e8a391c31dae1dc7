"""Atomic operations in device and threadgroup memory."""

import pytest
import torch

from metal_host import MetalSyntaxError, compile_shader, observe

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


@pytest.mark.parametrize("type_", ["int", "uint"])
def test_integer_updates(device, type_):
    lib = compile_shader(f"""{HEADER}
    kernel void k(device atomic_{type_}* d, device {type_}* out, uint g [[thread_position_in_grid]],
        uint i [[thread_index_in_threadgroup]]) {{
      threadgroup atomic_{type_} t;
      if (i == 0) atomic_store_explicit(&t, 0, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&d[0], g, memory_order_relaxed);
      atomic_fetch_sub_explicit(&d[1], 1, memory_order_relaxed);
      atomic_fetch_max_explicit(&d[2], g, memory_order_relaxed);
      atomic_fetch_min_explicit(&d[3], g, memory_order_relaxed);
      atomic_fetch_and_explicit(&d[4], ~(1 << (g % 8)), memory_order_relaxed);
      atomic_fetch_or_explicit(&d[5], 1 << (g % 8), memory_order_relaxed);
      atomic_fetch_xor_explicit(&d[6], 1 << (g % 8), memory_order_relaxed);
      atomic_exchange_explicit(&d[7], 42, memory_order_relaxed);
      {type_} seen = atomic_load_explicit(&d[8], memory_order_relaxed);
      while (!atomic_compare_exchange_weak_explicit(&d[8], &seen, seen + 3, memory_order_relaxed,
          memory_order_relaxed)) {{}}
      atomic_fetch_add_explicit(&t, 2, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (i == 0) out[g / 64] = atomic_load_explicit(&t, memory_order_relaxed);
    }}""")
    dtype = torch.int32 if type_ == "int" else torch.uint32
    d = torch.tensor([0, 1000, 5, 5, 255, 0, 0, 0, 1], dtype=torch.int32, device=device).view(dtype)
    out = torch.zeros(2, dtype=torch.int32, device=device)
    lib.k(d, out, threads=128, group_size=64)
    assert d.view(torch.int32).tolist() == [127 * 64, 872, 127, 0, 0, 255, 0, 42, 1 + 3 * 128]
    assert out.tolist() == [128, 128]


def test_float_and_bool(device):
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device atomic<float>* f, device atomic_bool* b, uint g [[thread_position_in_grid]]) {
      atomic_fetch_add_explicit(f, 0.5f, memory_order_relaxed);
      atomic_fetch_sub_explicit(f + 1, 0.25f, memory_order_relaxed);
      if (g == 70) atomic_store_explicit(b, true, memory_order_relaxed);
    }"""
    )
    f, b = torch.zeros(2, device=device), torch.zeros(4, dtype=torch.uint8, device=device)
    lib.k(f, b, threads=100, group_size=32)
    assert f.tolist() == [50.0, -25.0]
    assert b.tolist()[0] == 1


def test_atomics_do_not_race():
    lib = compile_shader(
        HEADER
        + """
    kernel void k(device atomic_int* d) { atomic_fetch_add_explicit(d, 1, memory_order_relaxed); }
    """
    )
    d = torch.zeros(1, dtype=torch.int32)
    with observe() as launches:
        lib.k(d, threads=96, group_size=32)
    assert d.item() == 96
    assert launches[0].counters["atomics"] == 96


@pytest.mark.parametrize(
    "use",
    [
        "device atomic<half>* d) { atomic_load_explicit(d, memory_order_relaxed); }",
        "device atomic_float* d) { atomic_fetch_max_explicit(d, 1.0f, memory_order_relaxed); }",
        "device atomic_int* d) { atomic_fetch_add_explicit(d, 1, memory_order_seq_cst); }",
        "device int* d) { atomic_fetch_add_explicit(d, 1, memory_order_relaxed); }",
        "constant atomic_int* d) { atomic_load_explicit(d, memory_order_relaxed); }",
    ],
    ids=["half", "float max", "seq_cst", "plain int", "constant"],
)
def test_refused(use):
    with pytest.raises(MetalSyntaxError, match="program_source:3"):
        compile_shader(f"{HEADER}kernel void k({use}")
