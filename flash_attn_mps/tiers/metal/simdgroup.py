"""The `simdgroup` tier: tiled FlashAttention-2 on simdgroup matrices (`kernels/forward.metal`)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import backward, launch, trial, tune, variants
from .kernel import OPTIONAL_BUFFERS, SERVES, Grid, TunedKernel
from .prove import Proof
from .specialization import Specialization


class Variant(NamedTuple):
    """The shape of the tiled kernel: what is fastest depends on the GPU."""

    rows: int  # queries of a simdgroup: a multiple of 8
    simdgroups: int  # simdgroups of a threadgroup
    keys: int  # keys of a block: a multiple of 8
    staged: bool  # do the simdgroups of a group share their keys through threadgroup memory?
    shared_q: bool = False  # are queries in threadgroup memory? Else in registers.

    def __str__(self) -> str:
        """Like "16x4x32-direct" or "8x4x32-direct-q", as `MTLFLASHATTN_VARIANT` takes it."""
        shape = f"{self.rows}x{self.simdgroups}x{self.keys}"
        return f"{shape}-{'staged' if self.staged else 'direct'}{'-q' * self.shared_q}"


MAX_THREADGROUP_BYTES = 32 << 10
MAX_REGISTERS = 128  # of a lane of an Apple GPU, 32 bits each
_MOST_REGISTERS = MAX_REGISTERS - 4  # by `live_registers`, which is an estimate
_SPARE = 6  # registers that a default leaves, for a window's sides and what the estimate errs by


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    """Is there room for it, in memory and in registers? Queries leave the registers only where they fill them."""
    shape = (element_bytes, head_dim, head_dim_v)
    if variant.shared_q and live_registers(variant._replace(shared_q=False), *shape) + _SPARE <= MAX_REGISTERS:
        return False
    return _has_room(variant, *shape)


def _has_room(variant: Variant, *shape: int) -> bool:
    if threadgroup_bytes(variant, *shape) > MAX_THREADGROUP_BYTES or (variant.staged and variant.simdgroups == 1):
        return False
    # The smallest must do for odd head dims from 241 on, although a few values may be spilled there.
    is_smallest = variant.rows == variant.keys == 8 and variant.shared_q and not variant.staged
    return is_smallest or live_registers(variant, *shape) <= _MOST_REGISTERS


def live_registers(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> int:
    """About how many registers of a lane are alive together in a causal call.

    The two large parts are exact: o, and q where it is in registers. The rest is fitted to what the Metal runner counts
    in the kernel's code (its `live_registers`): tests/metal/test_registers.py holds the two against each other.
    """
    rows, keys = variant.rows // 8, variant.keys // 8
    o, q = 2 * rows * -(-head_dim_v // 8), element_bytes // 2 * rows * -(-head_dim // 8)
    # Slabs of each further width (fragment.metal) have addresses of their own.
    widths = [_slab_widths(dim, 16 // element_bytes) - 1 for dim in (head_dim, head_dim_v)]
    of_widths = sum(6 * (n > 0) + 5 * n // 2 for n in widths)
    rest = 2 * rows * keys + 4 * rows + keys + 30 + 2 * rows * variant.shared_q
    return o + (0 if variant.shared_q else q) + rest + 8 * variant.staged + of_widths


def _slab_widths(dim: int, most: int) -> int:
    """Of how many widths are the slabs of a row's fragments, up to `most` of them in one?"""
    return (dim // 8 >= most) + (dim // 8 % most).bit_count() + (dim % 8 > 0)


def demands(p: AttentionProblem) -> int:
    """How many registers its features take beyond those of a causal call, as the runner counts them."""
    return (
        12 * (p.mask is not None)
        + 10 * (p.dropout_p > 0)
        + 8 * (p.cu_seqlens_q is not None or p.block_table is not None)
        + 8 * (p.k.dtype is not p.q.dtype)
        + 4 * (p.alibi_slopes is not None)
    )


def threadgroup_bytes(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> int:
    total = 0
    if variant.staged:
        padding = 16 // element_bytes
        rows = sum(-(-dim // 8) * 8 + padding for dim in (head_dim, head_dim_v))
        votes = 2 * 4 * variant.simdgroups  # under a mask: staging.metal, `Votes`
        total += variant.keys * rows * element_bytes + votes
    if variant.shared_q:
        total += variant.simdgroups * variant.rows * -(-head_dim // 8) * 8 * element_bytes
    return total


# The best first, by the cost model of Apple's GPUs (docs/apple-model.md), for M1 to M4 alike. Direct: loads take whole
# cache lines, and staging costs barriers, address arithmetic and room. Sixteen rows halve what is loaded for a product.
_PREFERRED = (
    Variant(16, 4, 32, False),
    Variant(16, 4, 16, False),
    Variant(16, 4, 32, False, True),
    Variant(16, 4, 16, False, True),
    Variant(16, 2, 32, False, True),
    *(
        Variant(8, simdgroups, keys, False, shared_q)
        for keys in (32, 16, 8)
        for simdgroups in (4, 2)
        for shared_q in (False, True)
    ),
    *(Variant(8, 1, keys, False, True) for keys in (32, 16, 8)),
)
_ROOM_FOR_THREE = 20 << 10  # threadgroup bytes with which three groups are resident on a core of M1 ...
_ROOM_FOR_TEN = 6 << 10  # ... and those of a simdgroup with which ten simdgroups are


@functools.lru_cache(maxsize=512)
def default(element_bytes: int, head_dim: int, head_dim_v: int, demanded: int = 0) -> Variant:
    """What should do well on any GPU where nothing was tuned, with room for so many registers more (`demands`)."""
    shape = (element_bytes, head_dim, head_dim_v)
    fitting = [v for v in _PREFERRED if _has_room(v, *shape) and _is_small(v, *shape)] or [
        Variant(8, 4, 8, False, True)
    ]
    return next(
        (v for v in fitting if live_registers(v, *shape) + max(demanded, _SPARE) <= MAX_REGISTERS),
        min(fitting, key=lambda v: live_registers(v, *shape)),  # where all that takes registers comes together
    )


def _is_small(variant: Variant, *shape: int) -> bool:
    """In threadgroup memory. At the largest head dims queries of 32 bits are not: then one simdgroup a group."""
    room = min(_ROOM_FOR_THREE, _ROOM_FOR_TEN * variant.simdgroups)
    return variant.simdgroups == 1 or threadgroup_bytes(variant, *shape) <= room


def fallbacks(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> list[Variant]:
    """Code of another kind, then smaller tiles in smaller groups."""
    usual = default(element_bytes, head_dim, head_dim_v)
    small = [Variant(8, 2, keys, False, shared_q) for keys in (16, 8) for shared_q in (False, True)]
    return [usual, usual._replace(staged=True), Variant(8, 4, 16, True), *small]


def _trial(s: Specialization) -> trial.Trial:
    """Work for all simdgroups of a group, and a tail. There are more queries than keys: the first may see none."""
    queries, keys = s.variant.rows * s.variant.simdgroups, s.variant.keys
    seqlen_q = max(queries + 19, 2 * keys + 18)
    return trial.forward(s, seqlen_q, seqlen_q - 5)


def _grid(p: AttentionProblem, variant: Variant) -> Grid:
    return launch.tiles_of_queries(p, variant.rows * variant.simdgroups, 32 * variant.simdgroups)


FORWARD = TunedKernel(
    entry="attention_forward",
    headers=("metal_stdlib", "metal_simdgroup_matrix"),
    sources=(
        *launch.LANE_SOURCES,
        "fragment",
        *launch.FORWARD_SOURCES,
        "staging",
        "queries",
        "hidden",
        "tile",
        "attend",
        "forward",
    ),
    buffers=launch.FORWARD_BUFFERS,
    optional=tuple(OPTIONAL_BUFFERS),
    grid=_grid,
    variants=tuple(
        Variant(rows, simdgroups, keys, staged, shared_q)
        for rows in (8, 16, 32)
        for simdgroups in (1, 2, 4, 8)
        for keys in (8, 16, 32, 64)
        for staged in (False, True)
        for shared_q in (False, True)
    ),
    fits=fits,
    default=default,
    variable="MTLFLASHATTN_VARIANT",
    fallbacks=fallbacks,
    demands=demands,
    proof=Proof(_trial),
)


def serve(p: AttentionProblem) -> Result | None:
    """The forward pass, by the variant that is chosen or one in its place. None where none is to be used."""
    variant = variants.chosen(p, FORWARD, tune.briefly)
    result = launch.run(p, FORWARD, variant)
    if result is None:
        others = (launch.run(p, FORWARD, other) for other in variants.instead(p, FORWARD, variant))
        result = next((found for found in others if found is not None), None)
    return result


TIER = Tier(
    "simdgroup",
    SERVES | {"dropout", "quantised"},
    launch.limits,
    serve,
    backward.SERVES_BACKWARD,
    backward.run,
    metal=True,
)
