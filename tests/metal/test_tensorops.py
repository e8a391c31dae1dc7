"""The kernel on cooperative tensors over the grid, under every layout that these may have.

The runner lays cooperative tensors out as it is told: as the family Apple10 does, as older ones do, or in any way that
the interface allows, drawn from a seed. Code that assumes a layout which it does not have gives wrong numbers there.
"""

import pytest
import torch

from flash_attn_mps.tiers.metal import launch, tensorops
from metal_host import observe
from tests.attention.pairwise import case_id
from tests.metal_tiers import metal_on

from . import grid
from .calls import draw

KNOWN = ("apple10", "legacy")
SEEDS = tuple(range(1, 21))
FACTORS = {
    "dtype": (torch.float16, torch.bfloat16),
    "rows": (16, 32),
    "simdgroups": (1, 2, 4),
    "keys": (32, 64),
    "resident_q": (True, False),
    "layout": ("apple10", "legacy", "generic"),
}
SHAPES = 2  # for each case
DEFAULT = list(enumerate(grid.cases(**FACTORS)))
FULL = list(enumerate(grid.cases(dims=grid.DIMS + grid.MORE_DIMS, **FACTORS)))
SAMPLED = DEFAULT[:6]


@pytest.fixture(autouse=True, scope="module")
def _metal_4():
    with metal_on("cpu", version="4.0"):
        yield


def variant_of(case):
    return tensorops.Variant(
        case["rows"], case["simdgroups"], case["keys"], case["resident_q"], tensorops.LAYOUTS[case["layout"]]
    )


def launches(number, case):
    for spec in grid.specs(case, number, SHAPES):
        yield spec, tensorops.FORWARD, variant_of(case)


def run(number, case, seeds):
    """Code that knows a layout under that one; the generic code under both and those of `seeds`."""
    of_machine = [case["layout"]] if case["layout"] in KNOWN else [*KNOWN, *seeds]
    for seed, (spec, kernel, variant) in enumerate(launches(number, case)):
        print(variant, spec)
        call = draw(spec)
        for layout in of_machine:
            with observe(seed=seed, layout=layout):
                result = launch.run(call.problem, kernel, variant)
            call.check(result)


@pytest.mark.parametrize(("number", "case"), SAMPLED, ids=lambda x: x if isinstance(x, int) else case_id(x))
def test_grid(number, case):
    run(number, case, SEEDS[:2])
