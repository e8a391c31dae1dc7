"""The `simdgroup` tier: tiled FlashAttention-2 on simdgroup matrices (`kernels/forward.metal`)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import backward, gpu, launch, trial, tune, variants
from .kernel import OPTIONAL_BUFFERS, SERVES, Grid, TunedKernel
from .prove import Proof
from .specialization import Specialization


class Variant(NamedTuple):
    """The shape of the tiled kernel: what is fastest depends on the GPU."""

    rows: int  # queries of a simdgroup: a multiple of 8
    simdgroups: int  # simdgroups of a threadgroup
    keys: int  # keys of a block: a multiple of 8
    staged: bool  # do the simdgroups of a group share their keys through threadgroup memory?

    def __str__(self) -> str:
        """Like "16x4x32-direct", as `MTLFLASHATTN_VARIANT` takes it."""
        return f"{self.rows}x{self.simdgroups}x{self.keys}-{'staged' if self.staged else 'direct'}"


MAX_THREADGROUP_BYTES = 32 << 10


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    """Does it stay within threadgroup memory, and within registers that no GPU spills badly?"""
    wide = max(head_dim, head_dim_v)
    if variant.staged and threadgroup_bytes(variant, element_bytes, head_dim, head_dim_v) > MAX_THREADGROUP_BYTES:
        return False
    # 32-bit registers of a lane for q, o and s alone, of some 256.
    registers = variant.rows // 8 * (wide // 8 * (2 + element_bytes // 2) + variant.keys // 4)
    return registers <= 208 and not (variant.staged and variant.simdgroups == 1)


def threadgroup_bytes(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> int:
    if not variant.staged:
        return 0
    padding = 16 // element_bytes
    rows = sum(-(-dim // 8) * 8 + padding for dim in (head_dim, head_dim_v))
    votes = 2 * 4 * variant.simdgroups  # under a mask: staging.metal, `Votes`
    return variant.keys * rows * element_bytes + votes


@functools.lru_cache(maxsize=512)
def default(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """What should do well on this machine's GPU generation: M1 and M2 staged, later ones direct.

    An unknown GPU gets the staged one, which does no more of anything than PyTorch's kernel (tests/metal/counters.py).
    """
    wide = max(head_dim, head_dim_v)
    staged = gpu.generation() <= 2
    rows = 16 if wide <= 64 and element_bytes == 2 else 8
    keys = 32 if wide <= 128 else 16
    preferred = Variant(rows, 4, keys, staged)
    candidates = [preferred, preferred._replace(keys=16), preferred._replace(keys=8), preferred._replace(staged=False)]
    return next(variant for variant in candidates if fits(variant, element_bytes, head_dim, head_dim_v))


def fallbacks(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> list[Variant]:
    """Code of another kind for the same tile, then smaller tiles in smaller groups."""
    usual = default(element_bytes, head_dim, head_dim_v)
    small = usual._replace(rows=8, simdgroups=2, keys=min(usual.keys, 16), staged=False)
    return [usual, usual._replace(staged=not usual.staged), small, small._replace(keys=8)]


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
        "codes",
        "fragment",
        "scoring",
        "philox",
        "dropout",
        "range",
        "masking",
        "kept",
        "keys",
        "staging",
        "tile",
        "attend",
        "forward",
    ),
    buffers=launch.FORWARD_BUFFERS,
    optional=tuple(OPTIONAL_BUFFERS),
    grid=_grid,
    variants=tuple(
        Variant(rows, simdgroups, keys, staged)
        for rows in (8, 16, 32)
        for simdgroups in (1, 2, 4, 8)
        for keys in (8, 16, 32, 64)
        for staged in (False, True)
    ),
    fits=fits,
    default=default,
    variable="MTLFLASHATTN_VARIANT",
    fallbacks=fallbacks,
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
