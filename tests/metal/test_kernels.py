"""Both kernels over the grid, instrumented.

Right by the error rule, and no race, no access outside a buffer, no read of threadgroup memory that nobody wrote, no
barrier that some threads miss.
"""

import pytest

from flash_attn_mps.tiers.metal import launch, scalar, simdgroup
from metal_host import observe
from tests.attention.pairwise import case_id

from . import grid
from .calls import draw
from .precompile import precompile

SCALAR_DIMS = [(8, 8), (64, 64), (13, 13), (40, 24), (1, 100)]
SHAPES = 2  # for each case


def numbered(kind, cases, by_default=1):
    """Of `by_default` cases each the first is run by default."""
    return [
        pytest.param(
            *(kind, n, case), id=f"{kind}{n}-{case_id(case)}", marks=[pytest.mark.metal_full] * (n % by_default > 0)
        )
        for n, case in enumerate(cases)
    ]


GRID = numbered("tiled", grid.cases(**grid.VARIANTS), 2) + numbered("scalar", grid.cases(dims=SCALAR_DIMS), 2)
FULL = [
    *numbered("tiled", grid.cases(dims=grid.DIMS + grid.MORE_DIMS, **grid.VARIANTS)),
    *numbered("variant", grid.cases_of_every_variant()),
    *numbered("scalar", grid.cases(dims=[*SCALAR_DIMS, (100, 1), (72, 72), (3, 200)], long=(True,))),
]


def launches(kind, number, case):
    if kind == "scalar":
        kernel, variant = scalar.FORWARD, scalar.VARIANT
    else:
        kernel, variant = simdgroup.FORWARD, grid.fitting(case)
    for spec in grid.specs(case, number, SHAPES):
        yield spec, kernel, variant


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """The kernels of the chosen tests, compiled side by side."""
    chosen = [item.callspec.params for item in request.session.items if item.module is request.module]
    precompile((draw(spec).problem, kernel, variant) for how in chosen for spec, kernel, variant in launches(**how))


def run(kind, number, case):
    for seed, (spec, kernel, variant) in enumerate(launches(kind, number, case)):
        print(variant, spec)
        call = draw(spec)
        with observe(seed=seed):
            result = launch.run(call.problem, kernel, variant)
        call.check(result)


@pytest.mark.parametrize(("kind", "number", "case"), GRID)
def test_grid(kind, number, case):
    run(kind, number, case)


@pytest.mark.metal_full
@pytest.mark.parametrize(("kind", "number", "case"), FULL)
def test_whole_grid(kind, number, case):
    run(kind, number, case)
