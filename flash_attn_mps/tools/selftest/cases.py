"""What the self-test runs: a case is a tier, a dtype, head dims, a feature and, for the tiled kernel, a variant.

Its name says all of it, so that a failure on somebody's machine can be run again on another:
"simdgroup:bfloat16:64:64:window:16x4x32-direct".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...tiers import BY_NAME, Tier, cpu
from ...tiers.metal import backward_kernels, decode, few, simdgroup, tensorops, tensorops_probe

TILED = simdgroup.TIER  # a case of it that names a variant runs that: of the forward kernel, or of those of gradients


class Feature(NamedTuple):
    """One kind of call. Sequence b has `lengths[b]` = (queries, keys)."""

    lengths: tuple[tuple[int, int], ...] = ((100, 100), (100, 100))
    heads: tuple[int, int] = (2, 2)  # of q; of k and v
    # dense, packed, packed and used (with seqused_q and seqused_k), used (padded, with seqused_k), leftpad,
    # indexed (with kv_batch_idx), paged
    layout: str = "dense"
    strides: str = "contiguous"  # or heads first, gaps (rows neither adjacent nor aligned), last (its stride is 2)
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""  # or heads, batch: the shape of the slopes
    sinks: bool = False
    mask: str = ""  # or bool, float
    scale: str = ""  # or number, tensor
    want_lse: bool = True
    codes: str = ""  # or uint8, int8: the dtype of k and v where they are quantised
    dropout: float = 0.0
    gradients: bool = False  # are those of q, k, v and sinks computed too?


_RAGGED = ((100, 100), (1, 70), (0, 9), (33, 0), (64, 257))
FEATURES = {
    "full": Feature(),
    "no lse": Feature(want_lse=False),
    "causal": Feature(causal=True),
    "causal, more keys": Feature(((33, 100),), causal=True),
    "causal, more queries": Feature(((100, 33),), causal=True),
    "window": Feature(window=(17, 5)),
    "left window": Feature(((100, 257),), window=(40, -1), causal=True),
    "right window": Feature(((64, 100),), window=(-1, 9)),
    "softcap": Feature(softcap=3.0),
    "alibi": Feature(alibi="heads"),
    "alibi of a batch": Feature(alibi="batch", causal=True),
    "grouped": Feature(heads=(6, 2), causal=True),
    "one kv head": Feature(heads=(4, 1)),
    "sinks": Feature(sinks=True, causal=True),
    "bool mask": Feature(mask="bool"),
    "float mask": Feature(mask="float", heads=(4, 2)),
    "scale": Feature(scale="number"),
    "scale in a tensor": Feature(scale="tensor"),
    "packed": Feature(_RAGGED, layout="packed"),
    "packed, causal": Feature(_RAGGED, layout="packed", causal=True, heads=(4, 2)),
    "packed, everything": Feature(_RAGGED, (4, 2), "packed", "gaps", True, (50, 0), 5.0, "batch", True),
    "packed, used": Feature(_RAGGED, layout="packed and used", causal=True),
    "used keys": Feature(((3, 50), (3, 1), (3, 90)), layout="used", causal=True),
    "left padding": Feature(((3, 50), (3, 40), (3, 90)), layout="leftpad"),
    "cache index": Feature(((5, 60), (5, 60), (5, 60)), layout="indexed", causal=True),
    "pages": Feature(((3, 50), (3, 100), (3, 7)), (4, 2), "paged", causal=True),
    "e4m3": Feature(codes="uint8", causal=True, heads=(4, 2)),
    "int8": Feature(((5, 257),), codes="int8", heads=(4, 2), strides="gaps"),
    "heads first": Feature(strides="heads first"),
    "gaps": Feature(strides="gaps", causal=True),
    "strided last dim": Feature(strides="last"),
    "few queries": Feature(((3, 700), (3, 700)), (8, 1), causal=True),
    "few queries, everything": Feature(
        ((4, 700), (1, 70), (0, 9), (3, 0), (7, 257)), (8, 2), "packed", "gaps", True, (300, 0), 5.0, "batch", True
    ),
    "few queries, bool mask": Feature(((3, 500), (3, 500)), (4, 2), mask="bool"),
    "few queries, float mask": Feature(((5, 300),), (6, 2), mask="float", sinks=True),
    **{
        f"{q} queries, {k} keys": Feature(((q, k),), causal=True)
        for q, k in ((1, 257), (1, 1100), (7, 31), (32, 32), (257, 64))
    },
    "dropout": Feature(dropout=0.3, causal=True, heads=(4, 2)),
    "packed, dropout": Feature(_RAGGED, layout="packed", dropout=0.3),
}
_DIFFERENTIATED = (
    "full",
    "causal",
    "causal, more keys",
    "causal, more queries",
    "window",
    "right window",
    "softcap",
    "alibi of a batch",
    "grouped",
    "one kv head",
    "sinks",
    "bool mask",
    "float mask",
    "scale in a tensor",
    "packed",
    "packed, everything",
    "packed, used",
    "heads first",
    "gaps",
    "strided last dim",
    "dropout",
    "packed, dropout",
)
FEATURES |= {f"gradients, {name}": FEATURES[name]._replace(gradients=True) for name in _DIFFERENTIATED}

# What shows whether a variant works: both edges, lengths that are no multiple of any block, sequences of no length.
_OF_VARIANTS = ("packed, everything", "full", "causal")
_OF_BACKWARD_VARIANTS = tuple(f"gradients, {name}" for name in _OF_VARIANTS)


class Case(NamedTuple):
    tier: str
    dtype: str
    head_dim: int
    head_dim_v: int
    feature: str
    variant: str = ""  # "": whichever the tier chooses

    def __str__(self) -> str:
        return ":".join(map(str, self)).removesuffix(":")


def parse(text: str) -> Case:
    """The case of that name. Raises `ValueError` saying what is not known."""
    parts = text.split(":")
    if len(parts) not in (5, 6):
        raise ValueError(f"{text!r} is not of the form tier:dtype:head_dim:head_dim_v:feature[:variant]")
    tier, dtype, head_dim, head_dim_v, feature, *variant = parts
    if feature not in FEATURES:
        raise ValueError(f"feature {feature!r} is not known; known: {', '.join(FEATURES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
    case = Case(tier, dtype, int(head_dim), int(head_dim_v), feature, *variant)
    if case.variant and case.variant not in variants(case):
        raise ValueError(f"variant {case.variant!r} does not exist for {case}")
    return case


DTYPES = ("float16", "bfloat16", "float32")
_USUAL = [(d, d) for d in (32, 64, 80, 96, 128, 256)] + [(192, 128)]
_ALL = sorted({*_USUAL, *((d, d) for d in range(8, 257, 8)), (1, 1), (33, 33), (100, 100), (128, 64), (64, 128)})
_HEAD_DIMS = {"quick": [(64, 64), (128, 128)], "usual": _USUAL, "full": _ALL}
# Head dims, dtypes and how many of _OF_VARIANTS each variant is run with.
_VARIANTS = {
    "quick": ([(64, 64)], ("float16",), 1),
    "usual": ([(64, 64), (128, 128)], DTYPES, 1),
    "full": ([*_USUAL, (72, 72)], DTYPES, 3),
}


def cases(level: str, metal: bool) -> Iterator[Case]:
    """All cases of a level: of the Metal tiers too where there is Metal."""
    head_dims = _HEAD_DIMS[level]
    if metal:
        for dtype in DTYPES:
            yield from (Case(TILED.name, dtype, *dims, feature) for dims in head_dims for feature in _served(TILED))
        wanted, dtypes, count = _VARIANTS[level]
        for dtype in dtypes:
            for dims in wanted:
                for names in (_OF_VARIANTS, _OF_BACKWARD_VARIANTS):
                    plain = [Case(TILED.name, dtype, *dims, name) for name in names[:count]]
                    for name, variant in variants(plain[0]).items():
                        if (
                            level == "full"
                            or not FEATURES[names[0]].gradients
                            or backward_kernels.KEYS.worth_tuning(variant)
                        ):
                            yield from (case._replace(variant=name) for case in plain)
    if metal and not tensorops_probe.why_closed():
        yield from _of_tensorops(level)
    few = _USUAL if level == "full" else head_dims[:2]
    # The tiled kernels are covered above. The cpu tier is PyTorch's own code, which needs no test on a Mac.
    for name, tier in BY_NAME.items():
        if name in (TILED.name, tensorops.TIER.name, cpu.TIER.name) if metal else tier.metal:
            continue
        wide = [(decode.MAX_HEAD_DIM, decode.MAX_HEAD_DIM)] if tier is decode.TIER else []
        for dtype in DTYPES:
            yield from (Case(name, dtype, *dims, feature) for dims in [*few, *wide] for feature in _served(tier))


def _of_tensorops(level: str) -> Iterator[Case]:
    """Where the machine has tensor operations."""
    dtypes, name = ("float16", "bfloat16"), tensorops.TIER.name
    for dtype in dtypes:
        for dims in _HEAD_DIMS[level]:
            yield from (Case(name, dtype, *dims, feature) for feature in _served(tensorops.TIER))
    wanted, of_variants, count = _VARIANTS[level]
    for dtype in (d for d in dtypes if d in of_variants):
        for dims in wanted:
            for feature in _OF_VARIANTS[:count]:
                case = Case(name, dtype, *dims, feature)
                yield from (case._replace(variant=variant) for variant in variants(case))


def _is_few(feature: Feature) -> bool:
    """Does the decode tier serve it?"""
    queries, keys = map(max, zip(*feature.lengths, strict=True))
    return queries <= few.DEFAULT and keys >= decode.MIN_KEYS


def _served(tier: Tier) -> Iterator[str]:
    """Without gradients for a tier that computes none; few queries for the tier of these."""
    names = (name for name, feature in FEATURES.items() if tier.backward is not None or not feature.gradients)
    return (name for name in names if tier is not decode.TIER or _is_few(FEATURES[name]))


def variants(case: Case) -> dict[str, Any]:
    """Those of the kernel that computes the case, by name: of a forward kernel, or of those of gradients."""
    shape = getattr(torch, case.dtype).itemsize, case.head_dim, case.head_dim_v
    if case.tier == tensorops.TIER.name:
        return {str(variant): variant for variant in tensorops.FORWARD.fitting(*shape)}
    if not FEATURES[case.feature].gradients:
        return {str(variant): variant for variant in simdgroup.FORWARD.fitting(*shape)}
    of_queries = set(backward_kernels.QUERIES.fitting(*shape))
    return {str(v): v for v in backward_kernels.KEYS.fitting(*shape) if v._replace(split=False) in of_queries}
