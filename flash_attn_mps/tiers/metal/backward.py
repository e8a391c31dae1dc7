"""The backward pass of the `simdgroup` tier: gradients by three kernels without atomics (`kernels/backward.metal`).

*Rows* finds out what the others must know of each query: 16 bytes for each, the only memory beside the gradients that
grows with the length. *Queries* makes dq, *keys* dk and dv; both compute the probabilities anew (FlashAttention-2,
algorithm 2: Dao, 2023, https://arxiv.org/abs/2307.08691). That is 7 products to the forward pass's 2, where one kernel
with atomics would do 5; in exchange every sum has one order: equal calls give equal bits, and dq needs no buffer in
float32. docs/backward.md has the shapes and what they cost.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...problem import AttentionProblem
from ..tier import LSE_GRADIENT, Gradients
from . import backward_trials, gpu, launch, variants
from .kernel import OPTIONAL_BUFFERS, SERVES, Buffer, Grid, Kernel, TunedKernel
from .prove import Proof

MAX_THREADGROUP_BYTES = 32 << 10

_OF_CACHES = ("kv_batch_idx", "leftpad_k", "block_table", "k_descale", "v_descale")
# Keys in pages, in entries of a cache or behind padding are those of inference: the tier `torch` has their gradients.
_OPTIONAL = tuple(name for name in OPTIONAL_BUFFERS if name not in _OF_CACHES)
SERVES_BACKWARD = SERVES - {"paged", "kv_batch_idx", "leftpad_k"} | {"dropout", LSE_GRADIENT}

# A log-sum-exp of this size is rounded by 2^-24 of it, which is little beside how the dtype rounds a probability. Where
# one is larger, *rows* computes the scores of the query once more.
_LARGE_LSE = {torch.float16: 1024.0, torch.bfloat16: 8192.0, torch.float32: 64.0}

_SIMDGROUPS_PER_CORE = 24  # that hide each other's loads


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


@functools.lru_cache(maxsize=512)
def _default(sums: int, element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """What keeps within 128 registers, as M1 and M2 have: docs/backward.md. Staged there, direct on later GPUs."""
    wide, half = max(head_dim, head_dim_v), element_bytes == 2
    staged = gpu.generation() <= 2
    passing = (32 if wide <= 64 and half else 16) if staged else 8
    if sums == 1:
        in_registers = half and wide <= 128
        preferred = Variant(8, 4, passing, staged, in_registers, not half and wide > 64)
    else:
        in_registers = half and wide <= 64
        preferred = Variant(8, 4, passing, staged, in_registers, not in_registers, wide > 128)
    candidates = [
        preferred._replace(simdgroups=simdgroups, passing=rows, staged=staged and simdgroups > 1)
        for simdgroups in (4, 2, 1)
        for rows in (passing, 16, 8)
    ]
    return next(v for v in candidates if _fits(sums, v, element_bytes, head_dim, head_dim_v))


def _fallbacks(sums: int, variant: Variant, *shape: int) -> list[Variant]:
    """Code of another kind for the same tile, then smaller tiles in smaller groups."""
    usual = _default(sums, *shape)
    small = usual._replace(held=8, simdgroups=2, passing=8, staged=False)
    return [usual, usual._replace(staged=not usual.staged), small, small._replace(held_in_registers=False, reload=True)]


class _RowsVariant(NamedTuple):
    held: int  # queries of a simdgroup
    simdgroups: int


_ROWS_VARIANT = _RowsVariant(held=8, simdgroups=4)


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
_SHARED = ("codes", "fragment", "scoring", "philox", "dropout", "range", "keys", "staging", "held", "backward")

ROWS = Kernel(
    entry="attention_backward_rows",
    headers=_HEADERS,
    sources=("codes", "fragment", "scoring", "philox", "range", "keys", "held", "backward_rows"),
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
    defines={"OF_KEYS": 0, "ROWS": "HELD", "KEYS": "PASSING", "HAS_DA": 1, "HAS_DB": 0, "NEEDS_DP": 1},
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


def run(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
) -> Gradients | None:
    """The gradients, enqueued without waiting. None where a kernel does not compile on this machine."""
    queries, keys = variants.chosen(p, QUERIES), variants.chosen(p, KEYS)
    return compute(p, out, lse, dout, dlse, needed, queries, keys, each_head(p, keys))


def each_head(p: AttentionProblem, keys: Variant) -> bool:
    """Are KV heads so few that the GPU is only filled by a threadgroup of *keys* for each query head?"""
    return p.heads > p.heads_k and _simdgroups(p, keys) < _SIMDGROUPS_PER_CORE * gpu.cores()


def compute(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
    queries: Variant,
    keys: Variant,
    each_head: bool,
) -> Gradients | None:
    """`run` by these variants. `each_head`: is there a threadgroup of *keys* for each query head, not each KV head?"""
    q, k, v, out, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (p.q, p.k, p.v, out, dout))
    inputs = {"q": q, "k": k, "v": v, "dout": dout}
    terms = q.new_empty((*p.lse_shape, 4), dtype=torch.float32)
    rows = {"out": out, "lse": lse.contiguous(), "dlse": None if dlse is None else dlse.contiguous(), "terms": terms}
    large = {"large_lse": launch.float_bits(_LARGE_LSE[q.dtype])}
    if not launch.enqueue(ROWS, p, _ROWS_VARIANT, {**inputs, **rows}, large):
        return None
    inputs["terms"] = terms
    dq = dk = dv = None
    if "q" in needed:
        dq = q.new_empty(q.shape)
        tried = itertools.chain((queries,), variants.instead(p, QUERIES, queries))
        if not any(launch.enqueue(QUERIES, p, variant, {**inputs, "dq": dq}) for variant in tried):
            return None
    if needed & {"k", "v"}:
        tried = itertools.chain((keys,), variants.instead(p, KEYS, keys))
        makes = (_gradients_of_keys(p, inputs, needed, variant, each_head) for variant in tried)
        made = next((made for made in makes if made is not None), None)
        if made is None:
            return None
        dk, dv = made
    dsinks = terms[..., 3].transpose(-1, -2).flatten(0, -2).sum(0) if "sinks" in needed else None
    return Gradients(dq, dk, dv, dsinks)


def _gradients_of_keys(
    p: AttentionProblem, inputs: dict[str, torch.Tensor], needed: frozenset[str], variant: Variant, each_head: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """dk and dv, those that are needed."""
    kernel, heads, dtype = (KEYS_OF_EACH_HEAD, p.heads, torch.float32) if each_head else (KEYS, p.heads_k, p.q.dtype)
    parameters = {
        "total_k": p.k.shape[1] if p.cu_seqlens_k is None else p.k.shape[0],
        "heads_together": p.heads // heads,
    }
    made: dict[str, torch.Tensor | None] = {"dk": None, "dv": None}
    for name in ("k", "v"):
        if name in needed:
            *rows, _, dim = inputs[name].shape
            made["d" + name] = inputs[name].new_empty((*rows, heads, dim), dtype=dtype)
    launches = [made]
    if variant.split and needed >= {"k", "v"}:
        launches = [{**made, "dv": None}, {**made, "dk": None}]
    for outputs in launches:
        if not launch.enqueue(kernel, p, variant, {**inputs, **outputs}, parameters):
            return None
    dk, dv = made.values()
    if each_head:
        dk, dv = (t if t is None else t.unflatten(-2, (p.heads_k, -1)).sum(-2).to(p.q.dtype) for t in (dk, dv))
    return dk, dv


def _simdgroups(p: AttentionProblem, variant: Variant) -> int:
    """How many of *keys* have work, at most."""
    keys = p.k.shape[0] if p.cu_seqlens_k is not None else p.k.shape[1] * p.batch
    return -(-keys // variant.held) * p.heads_k
