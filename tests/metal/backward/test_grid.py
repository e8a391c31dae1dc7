"""Gradients over the grid, instrumented.

Each of dq, dk, dv and dsinks by the error rule, and no race, no access outside a buffer, no read of memory that nobody
wrote. Rows of memory that no query may look at hold NaN or infinities, and so does dout where there are no queries.
"""

import pytest
import torch

from metal_host import observe
from tests.attention.pairwise import case_id

from . import grid

SMALL = {
    "dims": [(32, 16), (13, 20)],
    "dtype": [torch.float16, torch.float32],
    "storage": ["dense", "varlen-used", "dense-used"],
    "heads": [(4, 2), (3, 1)],
    "window": [(-1, -1), (-1, 0), (8, 1)],
    "alibi": [None, "BH"],
    "mask": [None, "bool", "float32"],
    "broadcast": ["", "hq"],
    "mask_layout": ["rows", "columns"],
    "scale": [None, -0.2],
    "layout": ["contiguous", "strided_last", "offset"],
    "dout": ["transposed", "expanded"],
    "passing": [8, 16],
    "simdgroups": [1, 2],
}


def numbered(kind, cases):
    return [pytest.param(n, case, id=f"{kind}{n}-{case_id(case)}") for n, case in enumerate(cases)]


def run(number, case):
    torch.manual_seed(number)
    call = grid.drawn(case, number)
    queries, keys = grid.variants(case)
    print(queries, keys, grid.spec(case, number))
    with observe(seed=number):
        got = call.run(queries, keys, case["each_head"])
    call.check(got)


@pytest.mark.parametrize(("number", "case"), numbered("small", grid.cases(**SMALL)))
def test_grid(number, case):
    run(number, case)


FULL = [
    *numbered("pair", grid.cases()),
    *numbered("dims", grid.cases(dims=grid.MORE_DIMS)),
    *numbered("variant", grid.cases_of_every_variant()),
]


@pytest.mark.metal_full
@pytest.mark.parametrize(("number", "case"), FULL)
def test_whole_grid(number, case):
    run(number, case)
