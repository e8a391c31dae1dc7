"""Live registers of the tiled kernel, counted in its code by the runner: within the 128 of a lane of Apple's GPUs."""

import pytest
import torch

from flash_attn_mps import describe
from flash_attn_mps.tiers.metal import launch, simdgroup
from metal_host import compile_shader, nvidia

pytestmark = pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice of a CUDA toolkit")

HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def counted(variant, dtype, head_dim):
    q = torch.empty(1, 64, 2, head_dim, dtype=dtype)
    p = describe.dense(q, q, q, describe.CallOptions(causal=True, want_lse=True))
    outputs = launch.outputs(p)
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": outputs.out, "lse": outputs.lse}
    specialization, _ = launch.arguments(simdgroup.FORWARD, p, variant, tensors)
    return compile_shader(specialization.source(), kernels=[]).live_registers(simdgroup.FORWARD.entry)


def check(variant, dtype, head_dim):
    live = counted(variant, dtype, head_dim)
    assert live <= simdgroup.MAX_REGISTERS
    assert abs(live - simdgroup.live_registers(variant, dtype.itemsize, head_dim, head_dim)) <= 24


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float16, 64), (torch.float16, 128), (torch.float16, 256), (torch.float32, 128)]
)
def test_the_default_fits_the_registers(dtype, head_dim):
    check(simdgroup.default(dtype.itemsize, head_dim, head_dim), dtype, head_dim)


@pytest.mark.metal_full
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_default_fits_the_registers(dtype, head_dim):
    check(simdgroup.default(dtype.itemsize, head_dim, head_dim), dtype, head_dim)


@pytest.mark.metal_full
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_variant_fits_the_registers(dtype, head_dim):
    """How many simdgroups a threadgroup has does not matter."""
    for variant in simdgroup.FORWARD.fitting(dtype.itemsize, head_dim, head_dim):
        if variant.simdgroups == 2:
            check(variant, dtype, head_dim)
