"""The kernels of the backward pass, and the shapes that they come in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from ...problem import AttentionProblem
from . import backward_trials, launch
from .kernel import OPTIONAL_BUFFERS, Buffer, Grid, Kernel, TunedKernel
from .prove import Proof

MAX_THREADGROUP_BYTES = 32 << 10

_OF_CACHES = ("kv_batch_idx", "leftpad_k", "block_table", "k_descale", "v_descale")  # which no gradient is served with
_OPTIONAL = tuple(name for name in OPTIONAL_BUFFERS if name not in _OF_CACHES)


class Variant(NamedTuple):
    """The shape of *queries* and *keys*: what is fastest depends on the GPU."""

    held: int  # rows that a simdgroup holds, queries or keys: a multiple of 8
    simdgroups: int  # simdgroups of a threadgroup
    passing: int  # rows of the other side in a block: a multiple of 8
    staged: bool  # do the simdgroups of a group share those through threadgroup memory?
    held_in_registers: bool  # or else in threadgroup memory
    reload: bool  # are passing rows loaded again for the gradient, instead of kept in registers?
    split: bool = False  # of *keys*: dk and dv in a launch each

    def __str__(self) -> str:
        """Like "8x4x16-staged-threadgroup-reload-split"."""
        words = [
            "staged" if self.staged else "direct",
            "registers" if self.held_in_registers else "threadgroup",
            *(["reload"] if self.reload else []),
            *(["split"] if self.split else []),
        ]
        return f"{self.held}x{self.simdgroups}x{self.passing}-{'-'.join(words)}"


def _variants(split: tuple[bool, ...]) -> tuple[Variant, ...]:
    return tuple(
        Variant(held, simdgroups, passing, staged, *operands, apart)
        for held in (8, 16)
        for simdgroups in (1, 2, 4, 8)
        for passing in (8, 16, 32)
        for staged in (False, True)
        for operands in ((True, False), (False, False), (False, True))
        for apart in split
    )


def _worth_tuning(variant: Variant) -> bool:
    """Small blocks load directly, larger ones pay for the barriers of staging them."""
    return variant.simdgroups == 4 and variant.staged == (variant.passing > 8)


def threadgroup_bytes(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> int:
    """What a threadgroup needs of its memory: backward.metal, `Memory`."""
    total = 0
    if not variant.held_in_registers:  # 16 bytes of each lane: held.metal
        step = 64 // element_bytes
        total += (
            variant.simdgroups
            * variant.held
            * sum(-(-dim // step) * step for dim in (head_dim, head_dim_v))
            * element_bytes
        )
    if variant.staged:
        total += (
            variant.passing
            * sum(-(-dim // 8) * 8 + 16 // element_bytes for dim in (head_dim, head_dim_v))
            * element_bytes
        )
        total += 2 * 4 * variant.simdgroups  # under a mask: staging.metal, `Votes`
    return total


def _fits(sums: int, variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    """Does it stay within threadgroup memory, and within registers that no GPU spills badly? `sums`: gradients made."""
    if variant.staged and variant.simdgroups == 1:
        return False
    if threadgroup_bytes(variant, element_bytes, head_dim, head_dim_v) > MAX_THREADGROUP_BYTES:
        return False
    # 32-bit registers of a lane for sums, held rows and passing rows alone, of some 256.
    fragments, both = variant.held // 8, -(-head_dim // 8) + -(-head_dim_v // 8)
    registers = fragments * both * (1 if sums == 1 or variant.split else 2)
    if variant.held_in_registers:
        registers += fragments * both * element_bytes // 2
    if not variant.reload:
        registers += both * element_bytes // 2 // (1 if sums == 2 and not variant.split else 2)
    return registers <= 176


# The defaults by bytes of an element, each up to a head dim: what does best in apple_model on M1 and on M3 among the
# variants that 128 registers hold (docs/backward.md).
_REGISTERS, _THREADGROUP, _RELOADED = (True, False), (False, False), (False, True)
_OF_QUERIES = {
    2: {
        64: Variant(16, 4, 8, False, *_THREADGROUP),
        128: Variant(8, 4, 8, False, *_REGISTERS),
        192: Variant(8, 2, 8, False, *_THREADGROUP),
        256: Variant(8, 1, 8, False, *_RELOADED),
    },
    4: {
        64: Variant(8, 4, 8, False, *_REGISTERS),
        128: Variant(8, 2, 8, False, *_THREADGROUP),
        256: Variant(8, 1, 8, False, *_RELOADED),
    },
}
_OF_KEYS = {
    2: {
        64: Variant(8, 4, 8, False, *_REGISTERS),
        96: Variant(8, 4, 8, False, *_THREADGROUP),
        128: Variant(8, 4, 8, False, *_RELOADED),
        192: Variant(8, 2, 8, False, *_THREADGROUP, split=True),
        256: Variant(8, 1, 8, False, *_RELOADED, split=True),
    },
    4: {
        64: Variant(8, 2, 8, False, *_THREADGROUP),
        128: Variant(8, 2, 8, False, *_RELOADED),
        256: Variant(8, 1, 8, False, *_RELOADED, split=True),
    },
}


@functools.lru_cache(maxsize=512)
def _default(sums: int, element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """What should do well on any GPU where nothing was tuned."""
    table = (_OF_QUERIES if sums == 1 else _OF_KEYS)[element_bytes]
    wide = max(head_dim, head_dim_v)
    return next(variant for most, variant in table.items() if wide <= most)


def _fallbacks(sums: int, variant: Variant, *shape: int) -> list[Variant]:
    """Code of another kind for the same tile, then smaller tiles in smaller groups."""
    usual = _default(sums, *shape)
    small = usual._replace(held=8, simdgroups=2, passing=8, staged=False)
    return [usual, usual._replace(staged=not usual.staged), small, small._replace(held_in_registers=False, reload=True)]


class _RowsVariant(NamedTuple):
    held: int  # queries of a simdgroup
    simdgroups: int


ROWS_VARIANT = _RowsVariant(held=8, simdgroups=4)


def _tiles_of_queries(p: AttentionProblem, variant: Any) -> Grid:
    return launch.tiles_of_queries(p, variant.held * variant.simdgroups, 32 * variant.simdgroups)


def _tiles_of_keys(heads: Callable[[AttentionProblem], int]) -> Callable[[AttentionProblem, Any], Grid]:
    def grid(p: AttentionProblem, variant: Any) -> Grid:
        """A group for each tile of keys, head and sequence; must match backward_keys.metal."""
        keys, threads = variant.held * variant.simdgroups, 32 * variant.simdgroups
        if p.cu_seqlens_k is None:
            return (-(-p.k.shape[1] // keys) * threads, heads(p), p.batch), (threads, 1, 1)
        return ((p.k.shape[0] // keys + p.batch) * threads, heads(p), 1), (threads, 1, 1)

    return grid


_INPUTS = {
    "q": Buffer("const T", row="head_dim"),
    "k": Buffer("const T", row="head_dim"),
    "v": Buffer("const T", row="head_dim_v"),
    "dout": Buffer("const T", row="head_dim_v"),
}
_HEADERS = ("metal_stdlib", "metal_simdgroup_matrix")
_SHARED = (
    *launch.LANE_SOURCES,
    "fragment",
    "scoring",
    "philox",
    "dropout",
    "range",
    "masking",
    "keys",
    "staging",
    "held",
    "products",
    "backward",
)

ROWS = Kernel(
    entry="attention_backward_rows",
    headers=_HEADERS,
    sources=(*launch.LANE_SOURCES, "fragment", "scoring", "philox", "range", "keys", "held", "backward_rows"),
    buffers={
        **_INPUTS,
        "out": Buffer("const T", row="head_dim_v"),
        "lse": Buffer("const float"),
        "dlse": Buffer("const float", optional=True),
        "terms": Buffer("float4"),
    },
    optional=_OPTIONAL,
    parameters=("large_lse",),
    grid=_tiles_of_queries,
    defines={"ROWS": "HELD", "KEYS": 8, "HELD_IN_REGISTERS": 1},
    proof=Proof(backward_trials.rows),
)

QUERIES = TunedKernel(
    entry="attention_backward_queries",
    headers=_HEADERS,
    sources=(*_SHARED, "backward_queries"),
    buffers={**_INPUTS, "terms": Buffer("const float4"), "dq": Buffer("T", row="head_dim")},
    optional=_OPTIONAL,
    grid=_tiles_of_queries,
    defines={"OF_KEYS": 0, "ROWS": "HELD", "KEYS": "PASSING", "HAS_DA": 1, "HAS_DB": 0, "HAS_DM": 0, "NEEDS_DP": 1},
    variants=_variants((False,)),
    fits=functools.partial(_fits, 1),
    default=functools.partial(_default, 1),
    variable="MTLFLASHATTN_VARIANT_DQ",
    gradients=frozenset("q"),
    worth_tuning=_worth_tuning,
    fallbacks=functools.partial(_fallbacks, 1),
    proof=Proof(backward_trials.queries),
)

KEYS = TunedKernel(
    entry="attention_backward_keys",
    headers=_HEADERS,
    sources=(*_SHARED, "backward_keys"),
    buffers={
        **_INPUTS,
        "terms": Buffer("const float4"),
        "dk": Buffer("T", row="head_dim", optional=True),
        "dv": Buffer("T", row="head_dim_v", optional=True),
    },
    optional=_OPTIONAL,
    parameters=("total_k", "heads_together"),
    grid=_tiles_of_keys(lambda p: p.heads_k),
    defines={
        "OF_KEYS": 1,
        "ROWS": "PASSING",
        "KEYS": "HELD",
        "HAS_DA": "HAS_DK",
        "HAS_DB": "HAS_DV",
        "HAS_DM": 0,
        "NEEDS_DP": "HAS_DK",
    },
    variants=_variants((False, True)),
    fits=functools.partial(_fits, 2),
    default=functools.partial(_default, 2),
    variable="MTLFLASHATTN_VARIANT_DKV",
    gradients=frozenset("kv"),
    worth_tuning=_worth_tuning,
    fallbacks=functools.partial(_fallbacks, 2),
    proof=Proof(backward_trials.keys),
)

# The same where KV heads are so few that it takes a threadgroup for each of the query heads to fill the GPU: their
# gradients are left apart, in float32, and summed by torch.
KEYS_OF_EACH_HEAD = dataclasses.replace(
    KEYS,
    buffers={
        **KEYS.buffers,
        "dk": Buffer("float", row="head_dim", optional=True),
        "dv": Buffer("float", row="head_dim_v", optional=True),
    },
    grid=_tiles_of_keys(lambda p: p.heads),
)


def mask_variant(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """Of *mask*, which has one for each shape. A tile has eight queries."""
    usual = Variant(16, 4, 8, False, True, False)
    smaller = (
        usual,
        usual._replace(held=8),
        Variant(8, 4, 8, False, False, False),
        Variant(8, 2, 8, False, False, False),
    )
    wide = max(head_dim, head_dim_v) * element_bytes
    return smaller[0 if wide <= 128 else 1 if wide <= 256 else 2 if wide <= 512 else 3]


def _tiles_of_mask(p: AttentionProblem, variant: Variant) -> Grid:
    """A simdgroup for each tile of the mask's own elements."""
    assert p.mask is not None
    batches, heads, rows, columns = p.mask.shape
    threads = 32 * variant.simdgroups
    groups = -(-columns // (variant.held * variant.simdgroups))
    return (groups * threads, -(-rows // variant.passing), batches * heads), (threads, 1, 1)


MASK = Kernel(
    entry="attention_backward_mask",
    headers=_HEADERS,
    sources=(*_SHARED, "backward_mask"),
    buffers={**_INPUTS, "terms": Buffer("const float4"), "dmask": Buffer("MASK_T")},
    optional=_OPTIONAL,
    parameters=("mask_batches", "mask_heads", "mask_rows", "mask_columns"),
    grid=_tiles_of_mask,
    defines={
        "OF_KEYS": 1,
        "ROWS": "PASSING",
        "KEYS": "HELD",
        "HAS_DA": 0,
        "HAS_DB": 0,
        "HAS_DM": 1,
        "NEEDS_DP": 1,
    },
    proof=Proof(backward_trials.mask),
)
