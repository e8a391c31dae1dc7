"""Live registers of the tiled kernel, counted in its code by the runner: within the 128 of a lane of Apple's GPUs."""

import pytest
import torch

from apple_model import features
from flash_attn_mps.tiers.metal import simdgroup
from metal_host import nvidia

pytestmark = pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice of a CUDA toolkit")

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# By how much the host's estimate may be wrong.
ABOVE, BELOW = 20, 12


def check(features_of_call, dtype, head_dim):
    """The default for such a call fits."""
    p = features.problem(features_of_call, dtype, head_dim)
    assert features.live_registers(p, features.default(p)) <= simdgroup.MAX_REGISTERS


@pytest.mark.parametrize(
    ("features_of_call", "dtype", "head_dim"),
    [
        ("mask, causal", torch.float16, 128),
        ("paged, causal", torch.float16, 128),
        ("packed, dropout, softcap, ALiBi, window", torch.float32, 64),
        ("mask, causal", torch.float16, 256),
        ("causal", torch.float32, 128),
    ],
)
def test_the_default_fits_the_registers(features_of_call, dtype, head_dim):
    check(features_of_call, dtype, head_dim)


@pytest.mark.metal_full
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_default_fits_the_registers(dtype, head_dim):
    for name in features.FEATURES:
        check(name, dtype, head_dim)


@pytest.mark.metal_full
@pytest.mark.parametrize("head_dim", [40, 72, 80, 88, 104, 112, 120, 160, 176, 224, 240])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_defaults_of_other_head_dims_fit_the_registers(dtype, head_dim):
    for name in ("window", "mask, causal", "paged, causal", "packed, dropout, softcap, ALiBi, window"):
        check(name, dtype, head_dim)


@pytest.mark.metal_full
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_variant_fits_the_registers(dtype, head_dim):
    """And the estimate is one. How many simdgroups a threadgroup has does not matter."""
    p = features.problem("causal", dtype, head_dim)
    for variant in simdgroup.FORWARD.fitting(dtype.itemsize, head_dim, head_dim):
        if variant.simdgroups == 2:
            live = features.live_registers(p, variant)
            assert live <= simdgroup.MAX_REGISTERS
            estimated = simdgroup.live_registers(variant, dtype.itemsize, head_dim, head_dim)
            assert estimated - ABOVE <= live <= estimated + BELOW
