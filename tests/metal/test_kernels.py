"""Both kernels over the grid, instrumented: right by the error rule, and no race, no access outside a buffer, no read of
threadgroup memory that nobody wrote, no barrier that some threads miss.
"""

import pytest

from flash_attn_mps.metal import launch
from flash_attn_mps.metal.scalar import _VARIANT as SCALAR
from tests.attention.pairwise import case_id
from tests.metal_host import observe

from . import grid
from .calls import draw
from .precompile import precompile

TILED = grid.cases(rows=(8, 16, 32), simdgroups=(1, 2, 4, 8), keys=(8, 16, 32, 64), staged=(False, True))
SCALARS = grid.cases(dims=[(8, 8), (64, 64), (13, 13), (40, 24), (1, 100)])
SHAPES = 3  # for each case


def launches(kind, case, number, shapes=SHAPES):
    entry, variant = ("attention_scalar", SCALAR) if kind == "scalar" else ("attention_forward", grid.fitting(case))
    for spec in grid.specs(case, number, shapes):
        yield spec, entry, variant


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """The kernels of the chosen tests, compiled side by side."""
    chosen = [item.callspec.params for item in request.session.items if item.module is request.module]
    precompile(
        (draw(spec).problem, entry, variant)
        for params in chosen
        for spec, entry, variant in launches(params["kind"], *params["case"])
    )


def parameters(kind, cases):
    return [pytest.param(kind, (case, n), id=f"{kind}-{case_id(case)}") for n, case in enumerate(cases)]


@pytest.mark.parametrize(("kind", "case"), parameters("tiled", TILED) + parameters("scalar", SCALARS))
def test_grid(kind, case):
    for seed, (spec, entry, variant) in enumerate(launches(kind, *case)):
        print(variant, spec)
        call = draw(spec)
        with observe(seed=seed):
            result = launch.run(call.problem, entry, variant)
        call.check(result)
