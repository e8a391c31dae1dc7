"""The grid of calls and shapes that the backward kernels are tested on, chosen pairwise."""

from __future__ import annotations

import math

import torch

from flash_attn_mps.tiers.metal import backward_kernels
from flash_attn_mps.tiers.metal.backward_kernels import Variant
from tests.attention.pairwise import pairwise
from tests.metal.calls import Spec, draw

from .gradients import Backward

# Windows whose span is one more than blocks of 8 hold: a range that begins or ends one row wrong shows only there.
WINDOWS = [(-1, -1), (-1, 0), (20, 0), (1, 0), (8, 1), (0, 1), (5, 9), (-1, 3), (7, -1)]
OPERANDS = {"registers": (True, False), "threadgroup": (False, False), "reload": (False, True)}

CASES = {
    "dims": [(64, 64), (40, 72), (128, 128), (13, 20)],
    "dtype": [torch.float16, torch.float32, torch.bfloat16],
    "storage": ["dense", "varlen", "varlen-used", "dense-used"],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "window": WINDOWS,
    "softcap": [0.0, 3.0],
    "alibi": [None, "BH", "H"],
    "sinks": [False, True],
    "mask": [None, None, "bool", "float32", "same"],
    "broadcast": ["", "b", "hq", "bhq", "k"],
    "mask_layout": ["rows", "columns", "offset"],
    "dropout": [0.0, 0.3],
    "scale": [None, -0.2, 0.0, "tensor"],
    "poison": [math.nan, math.inf],
    "layout": ["contiguous", "transposed", "offset", "packed", "strided_last"],
    "dout": ["contiguous", "transposed", "expanded", "offset"],
    "dlse": [False, True],
    "each_head": [False, True],
    "held": [8, 16],
    "simdgroups": [1, 2, 4],
    "passing": [8, 16, 32],
    "staged": [False, True],
    "operands": ["registers", "threadgroup", "reload"],
    "split": [False, True],
}
MORE_DIMS = [(d, d) for d in (1, 8, 24, 34, 80, 96, 192, 256)] + [(192, 128), (96, 64), (64, 96), (5, 250), (256, 1)]

EQUAL = [[(33, 33)] * 2, [(1, 40)] * 2, [(64, 32)], [(31, 64)] * 2, [(7, 97)], [(70, 9)]]
SAME_QUERIES = [[(7, 33), (7, 1), (7, 64)], [(33, 31), (33, 64)], [(40, 7), (40, 65)], [(9, 0), (9, 20)]]
RAGGED = [
    [(33, 33), (0, 0), (1, 1), (64, 64)],
    [(1, 50), (7, 9), (0, 4), (31, 40)],
    [(64, 7), (9, 0), (32, 31)],
    [(3, 97), (0, 0)],
]


def cases(**changes) -> list[dict]:
    return pairwise(**{**CASES, **changes})


def cases_of_every_variant() -> list[dict]:
    """Every variant of both kernels for some head dims, each with the next of the other factors."""
    others, chosen = cases(), []
    shape = ("held", "simdgroups", "passing", "staged", "operands", "split")
    names = {pair: name for name, pair in OPERANDS.items()}
    for dtype, dims in ((torch.float16, (64, 64)), (torch.float32, (20, 13)), (torch.bfloat16, (192, 128))):
        for variant in backward_kernels.KEYS.fitting(dtype.itemsize, *dims):
            held, simdgroups, passing, staged, in_registers, reload, split = variant
            levels = (held, simdgroups, passing, staged, names[in_registers, reload], split)
            other = others[len(chosen) % len(others)]
            chosen.append({**other, **dict(zip(shape, levels, strict=True)), "dtype": dtype, "dims": dims})
    return chosen


def variants(case: dict) -> tuple[Variant, Variant]:
    """Of queries and keys, made smaller until they fit the head dims."""
    held, simdgroups, passing = case["held"], case["simdgroups"], case["passing"]
    staged = case["staged"] and simdgroups > 1
    variant = Variant(held, simdgroups, passing, staged, *OPERANDS[case["operands"]], case["split"])
    element_bytes = case["dtype"].itemsize
    while not backward_kernels.KEYS.fits(variant, element_bytes, *case["dims"]):
        if variant.passing > 8:
            variant = variant._replace(passing=8)
        elif variant.held > 8:
            variant = variant._replace(held=8)
        elif variant.simdgroups > 2:
            variant = variant._replace(simdgroups=2)
        elif variant.staged:
            variant = variant._replace(staged=False, simdgroups=1)
        else:
            variant = variant._replace(held_in_registers=False, reload=True, split=True)
    return variant._replace(split=False), variant


def spec(case: dict, number: int) -> Spec:
    lengths = {"dense": EQUAL, "dense-used": SAME_QUERIES}.get(case["storage"], RAGGED)
    scale = torch.tensor(0.3, dtype=torch.float16) if case["scale"] == "tensor" else case["scale"]
    return Spec(
        lengths[number % len(lengths)],
        case["dims"],
        case["dtype"],
        case["storage"],
        case["heads"],
        case["window"],
        case["softcap"],
        case["alibi"],
        case["sinks"],
        case["mask"],
        case["broadcast"],
        case["mask_layout"],
        scale,
        layout=(case["layout"],) * 3,
        poison=case["poison"],
        dropout_p=case["dropout"],
    )


def drawn(case: dict, number: int) -> Backward:
    return Backward(draw(spec(case, number)), dlse=case["dlse"], layout=case["dout"])
