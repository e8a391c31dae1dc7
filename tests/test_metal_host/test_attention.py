"""attention.metal against float64; on a GPU also what compute-sanitizer is run over (metal_host/README.md)."""

import time

import pytest

from metal_host import compile_shader, nvidia

from . import attention


@pytest.mark.parametrize("staged", [True, False], ids=["staged", "direct"])
@pytest.mark.parametrize(("head_dim", "seqlen"), [(32, 100), (64, 33), (64, 256), (128, 70)])
def test_forward(device, head_dim, seqlen, staged):
    library = compile_shader(attention.source(head_dim, staged))
    q, k, v = attention.inputs(2, seqlen, head_dim, device)
    assert attention.is_right(attention.run(library, q, k, v), attention.reference(q, k, v))


def test_it_is_fast_enough_to_test_with():
    """B1 H4 L256 D64 in less than a second on the CPU; it takes about 0.1 s."""
    library = compile_shader(attention.source())
    q, k, v = attention.inputs(4, 256)
    attention.run(library, q, k, v)
    start = time.perf_counter()
    attention.run(library, q, k, v)
    assert time.perf_counter() - start < 1.0


@pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice and ptxas of a CUDA toolkit")
@pytest.mark.parametrize(("staged", "shared"), [(True, 2 * 32 * 72 * 2 + 4 * 8 * 64 * 2), (False, 4 * 8 * 64 * 2)])
def test_registers_spills_and_shared_memory(staged, shared):
    library = compile_shader(attention.source(64, staged))
    used = library.resources("attention", 128)
    assert used.shared == shared
    assert used.spill_stores == used.spill_loads == used.stack == 0
    assert 32 < used.registers <= 255
