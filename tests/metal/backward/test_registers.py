"""The default variants fit in the 128 registers of a lane of Apple's GPUs, as the runner counts them."""

import pytest
import torch

from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.tiers.metal import backward, compiler
from flash_attn_mps.tiers.metal.backward_kernels import KEYS, QUERIES
from metal_host import compile_shader, nvidia

pytestmark = pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice of a CUDA toolkit")

MOST = 128
CASES = [
    *((torch.float16, dim) for dim in (64, 96, 128, 192, 256)),
    (torch.bfloat16, 64),
    *((torch.float32, dim) for dim in (64, 128, 256)),
]


@pytest.mark.parametrize("dim", [64, 128])
def test_defaults_fit_in_the_registers(dim, monkeypatch):
    check(torch.float16, dim, monkeypatch)


@pytest.mark.metal_full
@pytest.mark.parametrize(("dtype", "dim"), CASES, ids=str)
def test_all_defaults_fit_in_the_registers(dtype, dim, monkeypatch):
    check(dtype, dim, monkeypatch)


def check(dtype, dim, monkeypatch):
    variants = [kernel.default(dtype.itemsize, dim, dim) for kernel in (QUERIES, KEYS)]
    asked = []
    monkeypatch.setattr(
        compiler, "kernel", lambda specialization: asked.append(specialization) or (lambda *_, **__: None)
    )
    q, k, v = (torch.zeros(1, 64, 2, dim, dtype=dtype) for _ in range(3))
    p = dense(q, k, v, CallOptions(causal=True, want_lse=True))
    backward.compute(p, q, torch.zeros(p.lse_shape), q, None, frozenset("qkv"), *variants, each_head=False)
    for specialization in asked:
        entry = specialization.kernel.entry
        registers = compile_shader(specialization.source(), kernels=[]).live_registers(entry)
        print(entry, specialization.variant, registers)
        assert registers <= MOST
