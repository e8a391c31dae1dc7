"""Quantised keys and values in kernels, instrumented, and in the torch tier: every code, calls by the error rule."""

import pytest
import torch

from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers import dequantised, reference
from flash_attn_mps.tiers.metal import launch, scalar, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import observe
from tests.attention.pairwise import case_id, pairwise

from . import grid
from .calls import Spec, draw

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
KERNELS = {
    "direct": (simdgroup.FORWARD, Variant(8, 2, 16, False)),
    "staged": (simdgroup.FORWARD, Variant(16, 2, 8, True)),
    "scalar": (scalar.FORWARD, scalar.VARIANT),
}
CASES = pairwise(
    codes=CODES,
    kernel=tuple(KERNELS),
    dtype=grid.DTYPES,
    dims=((64, 64), (13, 20), (96, 40), (128, 128)),
    storage=("dense", "varlen-used", "cache", "paged", "paged-cache"),
    window=((-1, -1), (-1, 0), (20, 3)),
    softcap=(0.0, 3.0),
    sinks=(False, True),
    alibi=(None, "BH"),
    mask=(None, "bool"),
    descales=("both", "one", "k", "v"),
    layout=("contiguous", "transposed", "offset", "strided_last"),
)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [*(("direct", dtype) for dtype in grid.DTYPES), ("staged", grid.DTYPES[1]), ("scalar", grid.DTYPES[0])],
)
@pytest.mark.parametrize("codes", CODES)
def test_every_code_is_decoded_exactly(kernel, codes, dtype):
    """One key, whose value is the output. What is not finite makes the output NaN in the tiled kernel."""
    every = torch.arange(256, dtype=torch.uint8).view(codes)
    if kernel != "scalar":
        every = every.view(2, 128)  # heads: registers and threadgroup memory are few
    v = every.view(1, 1, -1, every.shape[-1])
    q = torch.zeros(1, 1, v.shape[2], 8, dtype=dtype)
    p = AttentionProblem(q, torch.zeros(1, 1, v.shape[2], 8, dtype=codes), v, 1, 1, 1, 1.0)
    out = launch.run(p, *KERNELS[kernel]).out
    expected = v.float().to(dtype)
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[finite], expected[finite])


def drawn(case):
    storage = case["storage"]
    lengths = [(33, 40), (33, 9)] if storage in ("cache", "paged-cache") else [(9, 40), (0, 4), (31, 33)]
    lengths = [(33, 40)] * 2 if storage == "dense" else lengths
    same = {name: case[name] for name in ("window", "softcap", "alibi", "sinks", "codes", "descales")}
    mask = None if storage in ("varlen-used", "paged") else case["mask"]
    layout = ("contiguous", case["layout"], case["layout"])
    return draw(Spec(lengths, case["dims"], case["dtype"], storage, mask=mask, layout=layout, **same))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_float64(case):
    call = drawn(case)
    with observe():
        result = launch.run(call.problem, *KERNELS[case["kernel"]])
    call.check(result)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_torch_tier_against_float64(case, monkeypatch):
    """In parts of a few rows."""
    monkeypatch.setattr(dequantised, "_ELEMENTS", 2000)
    call = drawn(case)
    call.check(reference.run(call.problem))


@pytest.mark.metal_full
@pytest.mark.parametrize("case", grid.cases(codes=CODES, **grid.VARIANTS), ids=case_id)
def test_whole_grid(case):
    for spec in grid.specs(case, 0, 3):
        spec.codes = case["codes"]
        call = draw(spec)
        with observe():
            call.check(launch.run(call.problem, simdgroup.FORWARD, grid.fitting(case)))
