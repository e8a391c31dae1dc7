"""The decode kernel and the one that puts splits together: over a grid, instrumented, and what they read and start.

As `test_kernels.py`: right by the error rule, no race, no access outside a buffer, no read of threadgroup memory that
nobody wrote, no barrier that some threads miss; what no query sees holds NaN or infinity.
"""

import dataclasses
import math

import pytest
import torch

from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import decode
from flash_attn_mps.tiers.metal.decode import Variant
from metal_host import observe
from tests.attention.pairwise import case_id, pairwise

from . import grid
from .calls import STORAGES, Spec, draw
from .precompile import precompile

KEYS = [(300,), (65, 0, 700), (31, 257), (129, 7, 64), (1, 513)]  # of each sequence, by turns
FACTORS = {
    "dims": [(64, 64), (128, 128), (40, 40), (192, 128), (512, 512), (100, 72), (13, 13), (8, 40), (320, 256)],
    "dtype": grid.DTYPES,
    "storage": STORAGES,
    "queries": (1, 3, 8, 17),
    "heads": ((2, 2), (8, 2), (6, 2), (8, 1)),
    "small": (False, True),  # blocks of 8 keys, two units: as many splits, edges and turns as there can be
    "splits": (1, 2, 5),
    "window": tuple(grid.WINDOWS),
    "mask": (None, "bool", "same", "float32"),
    "mask_layout": ("rows", "offset", "columns"),
    "one": ("", "q", "k", "qk"),
    "softcap": (0.0, 3.0),
    "alibi": (None, "H", "BH"),
    "sinks": (False, True),
    "lse": (True, False),
    "scale": ("number", "float16", "float32"),
    "aligned": (True, False),
}
MORE_DIMS = [(80, 80), (96, 96), (256, 256), (72, 72), (250, 250), (384, 384), (1, 1), (3, 200), (257, 512)]
SHAPES = pairwise(
    turn=tuple(range(len(KEYS))),
    q=grid.LAYOUTS,
    k=grid.LAYOUTS,
    v=grid.LAYOUTS,
    broadcast=grid.BROADCASTS,
    left=(0, 5, 100),
    right=(0, 3, 17),
    scale=(None, 0.3, -0.2, 0.0),
    poison=(math.nan, math.inf),
    page_size=(1, 16, 50, 256),
)
ALL = list(enumerate(pairwise(**FACTORS)))
MORE = list(
    enumerate(pairwise(**{**FACTORS, "dims": MORE_DIMS, "queries": (2, 4, 9, 32), "heads": ((3, 3), (5, 1), (32, 2))}))
)


def numbered(cases):
    return [pytest.param(n, case, id=f"{n}-{case_id(case)}") for n, case in cases]


def specs(case, number, shapes=2):
    """The next shapes of the `number`th case."""
    for turn in range(number * shapes, (number + 1) * shapes):
        shape = SHAPES[turn % len(SHAPES)]
        keys = KEYS[shape["turn"]]
        if case["storage"] == "dense":
            keys = keys[:1] * len(keys)
        queries = [case["queries"]] * len(keys)
        if case["storage"] not in ("dense", "cache", "paged-cache"):
            queries[1:] = [0, 2][: len(keys) - 1]
        left, right = grid.WINDOWS[case["window"]]
        scale = shape["scale"]
        if case["scale"] != "number":
            scale = torch.tensor(0.25 if scale is None else scale, dtype=getattr(torch, case["scale"]))
        yield Spec(
            list(zip(queries, keys, strict=True)),
            case["dims"],
            case["dtype"],
            case["storage"],
            case["heads"],
            (shape["left"] if left else -1, (0 if case["window"] == "causal" else shape["right"]) if right else -1),
            case["softcap"],
            case["alibi"],
            case["sinks"],
            case["mask"],
            shape["broadcast"] + case["one"],
            case["mask_layout"],
            scale,
            case["lse"],
            (shape["q"], shape["k"], shape["v"]) if case["aligned"] else ("offset",) * 3,
            shape["poison"],
            shape["page_size"],
        )


def variant_of(p: AttentionProblem, small: bool) -> Variant:
    variant = next(decode.variants(p))
    return variant._replace(units=min(2, variant.units), keys=8) if small else variant


def calls(case, number):
    """The calls of a case, and the variant of each."""
    for spec in specs(case, number):
        print(spec)
        call = draw(spec)
        call.problem = dataclasses.replace(call.problem, num_splits=case["splits"])
        yield call, variant_of(call.problem, case["small"])


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """The kernels of the chosen tests of the grid, compiled side by side."""
    chosen = [
        item.callspec.params
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    cases = [how for how in chosen if "case" in how]
    precompile(((call.problem, variant) for how in cases for call, variant in calls(**how)), run=decode.run)


def run(number, case):
    for seed, (call, variant) in enumerate(calls(case, number)):
        print(variant)
        with observe(seed=seed):
            result = decode.run(call.problem, variant)
        call.check(result)


@pytest.mark.parametrize(("number", "case"), numbered(ALL[::4]))
def test_grid(number, case):
    run(number, case)


@pytest.mark.metal_full
@pytest.mark.parametrize(("number", "case"), numbered(ALL + MORE))
def test_whole_grid(number, case):
    run(number, case)
