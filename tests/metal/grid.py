"""The grid of calls that the kernels are tested on.

A case is what a kernel is compiled for; its shapes differ in what is an argument: lengths, heads, strides, the width of
the window, scale, the mask's broadcast over batch and heads. Both are chosen pairwise, and every case takes the next
few shapes by turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from flash_attn_mps.tiers.metal import simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from tests.attention.pairwise import pairwise

from .calls import STORAGES, Spec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = [(8, 8), (40, 40), (64, 64), (128, 128), (256, 256), (1, 1), (13, 13), (100, 100), (192, 128), (8, 40)]
MORE_DIMS = [(d, d) for d in range(16, 256, 8) if (d, d) not in DIMS] + [(5, 5), (20, 20), (250, 250), (255, 255)]
MORE_DIMS += [(128, 64), (64, 128), (20, 13), (100, 72), (3, 200), (256, 1)]

# Sequences (queries, keys). Queries have one length where the storage of q is dense.
EQUAL = [
    [(33, 33)],
    [(1, 100)] * 2,
    [(64, 32)],
    [(31, 64)] * 2,
    [(7, 257)],
    [(100, 100)],
    [(32, 7)] * 2,
    [(65, 31)],
    [(100, 1)],
]
SAME_QUERIES = [
    [(7, 33), (7, 1), (7, 64)],
    [(1, 100), (1, 0), (1, 257)],
    [(33, 31), (33, 64)],
    [(64, 7), (64, 65)],
]
RAGGED = [
    [(33, 33), (0, 0), (1, 1), (64, 64)],
    [(1, 100), (7, 9), (0, 4), (31, 64)],
    [(64, 7), (9, 0), (32, 31)],
    [(0, 5), (100, 32)],
    [(3, 257), (0, 0)],
]
LONG = [[(257, 257)], [(100, 257)], [(257, 64)]]

LAYOUTS = ("contiguous", "transposed", "packed", "expanded", "strided_last")
WINDOWS = {"none": (0, 0), "causal": (0, 1), "right": (0, 1), "left": (1, 0), "both": (1, 1)}  # which sides are closed
BROADCASTS = ("", "b", "h", "bh")

CASES = {
    "dims": DIMS,
    "dtype": DTYPES,
    "storage": STORAGES,
    "window": tuple(WINDOWS),
    "mask": (None, "bool", "same", "float32"),
    "mask_layout": ("rows", "offset", "columns"),
    "one": ("", "q", "k", "qk"),  # axes of queries or keys along which the mask is broadcast too
    "softcap": (0.0, 3.0),
    "dropout": (0.0, 0.3),
    "alibi": (None, "H", "BH"),
    "sinks": (False, True),
    "lse": (True, False),
    "scale": ("number", "float16", "float32"),  # or a 0-d tensor of that dtype
    "aligned": (True, False),
    "long": (False,),
}
VARIANTS = {
    "rows": (8, 16, 32),
    "simdgroups": (1, 2, 4, 8),
    "keys": (8, 16, 32, 64),
    "staged": (False, True),
    "shared_q": (False, True),
}
SHAPES = pairwise(
    turn=tuple(range(7)),
    heads=((2, 2), (4, 2), (3, 1)),
    q=LAYOUTS,
    k=LAYOUTS,
    v=LAYOUTS,
    broadcast=BROADCASTS,
    left=(0, 5, 40),
    right=(0, 3, 17),
    scale=(None, 0.3, -0.2, 0.0),
    poison=(math.nan, math.inf),
    page_size=(1, 16, 50),
)


def cases(**changes) -> list[dict]:
    """Pairwise cases; `changes` replaces factors or adds some."""
    return pairwise(**{**CASES, **changes})


def cases_of_every_variant() -> list[dict]:
    """Every variant of the tiled kernel for some head dims, each with the next of the other factors."""
    others = cases(long=(True,))
    chosen = []
    for dtype in (torch.float16, torch.float32):
        for dims in ((64, 64), (20, 13), (192, 128), (256, 256)):
            for variant in simdgroup.FORWARD.fitting(dtype.itemsize, *dims):
                other = others[len(chosen) % len(others)]
                chosen.append({**other, **variant._asdict(), "dtype": dtype, "dims": dims})
    return chosen


def fitting(case: dict) -> Variant:
    """The variant that a case asks for, made smaller until there is room for it."""
    staged = case["staged"] and case["simdgroups"] > 1
    variant = Variant(case["rows"], case["simdgroups"], case["keys"], staged, case["shared_q"])
    shape = (case["dtype"].itemsize, *case["dims"])
    while simdgroup.live_registers(variant, *shape) > simdgroup.MAX_REGISTERS and variant.keys > 8:
        variant = variant._replace(keys=variant.keys // 2)
    while simdgroup.live_registers(variant, *shape) > simdgroup.MAX_REGISTERS:
        variant = variant._replace(rows=variant.rows // 2) if variant.rows > 8 else variant._replace(shared_q=True)
    while simdgroup.threadgroup_bytes(variant, *shape) > simdgroup.MAX_THREADGROUP_BYTES:
        if variant.keys > 8 and variant.staged:
            variant = variant._replace(keys=variant.keys // 2)
        else:
            simdgroups = variant.simdgroups // 2
            variant = variant._replace(simdgroups=simdgroups, staged=variant.staged and simdgroups > 1)
    return variant


def specs(case: dict, number: int, shapes: int) -> Iterator[Spec]:
    """The next shapes of the `number`th case."""
    for turn in range(number * shapes, (number + 1) * shapes):
        shape = SHAPES[turn % len(SHAPES)]
        storage = case["storage"]
        if storage == "dense":
            lengths = LONG[turn % 3] if case["long"] and turn % 4 == 0 else EQUAL[turn % len(EQUAL)]
        elif storage in ("cache", "paged-cache"):
            lengths = SAME_QUERIES[turn % len(SAME_QUERIES)]
        else:
            lengths = RAGGED[turn % len(RAGGED)]
        if case["dims"] == (1, 1):  # the rule compares the largest of errors: among a few values that is luck
            lengths = lengths * 8
        left, right = WINDOWS[case["window"]]
        scale = shape["scale"]
        if case["scale"] != "number":
            scale = torch.tensor(0.25 if scale is None else scale, dtype=getattr(torch, case["scale"]))
        yield Spec(
            lengths,
            case["dims"],
            case["dtype"],
            storage,
            shape["heads"],
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
            dropout_p=case["dropout"],
        )
