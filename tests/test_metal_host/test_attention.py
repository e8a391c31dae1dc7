"""attention.metal against float64; on a GPU also what compute-sanitizer is run over (metal_host/README.md)."""

import time

import pytest

from metal_host import compile_shader

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
