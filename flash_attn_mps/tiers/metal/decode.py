"""The `decode` tier: few queries against many keys (`kernels/decode.metal`), whose keys are split over the GPU.

A tile has a row for each of the heads that share their keys, so each byte of keys and values is read once for all of
them. Where tiles alone do not fill the GPU the keys of each are split between threadgroups, and a second kernel
(`kernels/combine.metal`) puts their results together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import decode_trials, few, gpu, launch, simdgroup, store
from . import variants as choice
from .kernel import OPTIONAL_BUFFERS, SERVES, Buffer, Grid, Kernel, TunedKernel
from .prove import Proof


class Variant(NamedTuple):
    """The shape of the decode kernel."""

    rows: int  # of a tile: queries times heads that share their keys; a multiple of 8
    heads_in_tile: int  # heads that share their keys
    slices: int  # simdgroups that share the head dims of a block
    units: int  # blocks that a threadgroup works on at a time; a power of two
    keys: int  # keys of a block: a multiple of 8

    @property
    def simdgroups(self) -> int:
        return self.units * self.slices

    def fragments(self, head_dim: int) -> int:
        """Of a simdgroup's slice of that head dim: 8 elements each."""
        whole = -(-head_dim // 8)
        return -(-whole // self.slices)

    def __str__(self) -> str:
        """Like "1x8x32": slices, units and keys, as `MTLFLASHATTN_DECODE_VARIANT` takes it."""
        return f"{self.slices}x{self.units}x{self.keys}"


MAX_HEAD_DIM = 512
MIN_KEYS = 65  # with fewer keys there is nothing to divide
MAX_SPLITS = 128
_MAX_ROWS = few.ROWS_OF_A_TILE
ROWS = (8, 16, _MAX_ROWS)  # that a tile may have
_THREADGROUP_BYTES = 15 << 10  # more only where nothing else fits: an Apple core has some 60 KB, for four threadgroups
_MAX_REGISTERS = 112
# By the bytes of an element: with up to so many `registers` a lane has at most some 100 live ones (docs/decode.md), and
# an M1 core runs four threadgroups of four simdgroups.
_COMFORTABLE_REGISTERS = {2: 72, 4: 60}
_SIMDGROUPS = 4  # of a threadgroup
_SIMDGROUPS_PER_CORE = 16  # that a core works on at a time
# In products of fragments, as a simdgroup makes them where the GPU is full: the time of what a threadgroup does beside
# its rounds, and of a second launch; and how many elements of results are written and read again in the time of one. By
# the cost model of an M1 (docs/apple-model.md) and the latencies of memory; an H200 agrees (bench/nvidia_decode.py).
_OUTSIDE, _SECOND_LAUNCH, _ELEMENTS = 64, 64, 115
_COMBINE_THREADS = 256


def registers(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> int:
    """32-bit registers of a lane for q, o, s, p and the fragments of k or v that are loaded."""
    words = element_bytes // 2
    d, dv = variant.fragments(head_dim), variant.fragments(head_dim_v)
    of_a_row = d * words + 2 * dv + variant.keys // 8 * (2 + words)
    return variant.rows // 8 * of_a_row + max(d, dv) * words


def threadgroup_bytes(variant: Variant, head_dim: int, head_dim_v: int) -> int:
    """As decode.metal declares them: SHARED."""
    exchanged = 2 * variant.simdgroups * (variant.rows // 8) * (variant.keys // 8) if variant.slices > 1 else 0
    merged = variant.units // 2 * variant.slices * (variant.rows // 8) * (1 + variant.fragments(head_dim_v))
    q = variant.slices * (variant.rows // 8) * variant.fragments(head_dim) if variant.units > 1 else 0
    return max(exchanged, merged, q, 1) * 32 * 8


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    """Does it stay within registers and threadgroup memory?"""
    return (
        registers(variant, element_bytes, head_dim, head_dim_v) <= _MAX_REGISTERS
        and threadgroup_bytes(variant, head_dim, head_dim_v) <= simdgroup.MAX_THREADGROUP_BYTES
    )


@functools.lru_cache(maxsize=512)
def shapes(rows: int, heads_in_tile: int, element_bytes: int, head_dim: int, head_dim_v: int) -> tuple[Variant, ...]:
    """For tiles of `rows`, in the order in which to try them: the later ones need fewer threads in a group."""
    found = []
    for simdgroups in (_SIMDGROUPS, _SIMDGROUPS // 2):
        tried = [
            variant
            for slices in (1, 2, 4, 8, 16)
            for keys in (32, 16, 8)
            for variant in [Variant(rows, heads_in_tile, slices, max(simdgroups // slices, 1), keys)]
            if fits(variant, element_bytes, head_dim, head_dim_v)
        ]
        found.append(
            min(
                tried,
                key=lambda variant: (
                    registers(variant, element_bytes, head_dim, head_dim_v) > _COMFORTABLE_REGISTERS[element_bytes],
                    threadgroup_bytes(variant, head_dim, head_dim_v) > _THREADGROUP_BYTES,
                ),
            )
        )
    return tuple(dict.fromkeys(found))


def rows_of(p: AttentionProblem) -> int:
    """Rows of a tile: as few tiles as can be, since each reads the keys, and then as few rows as can be."""
    if p.num_splits == 1 and p.cu_seqlens_q is not None:
        return _MAX_ROWS  # whatever the other sequences of the batch have
    rows = p.max_seqlen_q * (p.heads // p.heads_k)
    tiles = -(-rows // _MAX_ROWS)
    return next(n for n in ROWS if n * tiles >= rows)


def _tiles(p: AttentionProblem, rows: int) -> tuple[int, int]:
    """Tiles of a sequence, or of all where they are packed; and the batch beside. As tile_of in scoring.metal."""
    heads_in_tile = p.heads // p.heads_k
    if p.cu_seqlens_q is None:
        return -(-p.max_seqlen_q * heads_in_tile // rows), p.batch
    return p.q.shape[0] * heads_in_tile // rows + p.batch, 1


def splits_of(p: AttentionProblem, variant: Variant) -> int:
    """Into how many parts the keys of each tile are divided, so that the threadgroups fill the GPU."""
    if p.num_splits == 1:
        return 1
    longest = p.max_seqlen_k
    if p.window_left >= 0:
        longest = min(longest, p.window_left + p.max_seqlen_q)
    a_round = variant.units * variant.keys
    if p.num_splits > 1:
        return min(p.num_splits, MAX_SPLITS, -(-longest // a_round))
    tiles, batch = _tiles(p, variant.rows)
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    products = (variant.rows // 8) * (variant.keys // 8) * (variant.fragments(head_dim) + variant.fragments(head_dim_v))
    rounds = -(-longest // a_round)
    coarse = 1 << max(rounds.bit_length() - 6, 0)  # so that a longer cache is seldom another case
    return cheapest(
        tiles * batch * p.heads_k,
        -(-rounds // coarse) * coarse,
        gpu.cores() * max(_SIMDGROUPS_PER_CORE // variant.simdgroups, 1),
        products,
        _OUTSIDE + variant.rows * head_dim_v // _ELEMENTS,
    )


@functools.lru_cache(maxsize=4096)
def cheapest(groups: int, rounds: int, places: int, products: int, beside: int) -> int:
    """Into how many parts to divide the `rounds` of each of `groups` threadgroups, of which `places` run at a time.

    The least number that takes at most 3 % longer than the best; one where the groups alone fill the GPU. A part takes
    `products` for each of its rounds and `beside` for the rest; the second launch takes one for each part. After
    FlashAttention-2's num_splits_heuristic: https://github.com/Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp
    """
    if groups >= 2 * places or groups / places / math.ceil(groups / places) >= 0.8:
        return 1

    def time(splits: int) -> int:
        turns = -(-groups * splits // places)
        second = _SECOND_LAUNCH + splits if splits > 1 else 0
        return turns * (-(-rounds // splits) * products + beside) + second

    times = [time(splits) for splits in range(1, min(rounds, MAX_SPLITS) + 1)]
    enough = 1.03 * min(times)
    return next(n + 1 for n, each in enumerate(times) if each <= enough)


def _grid(p: AttentionProblem, variant: Variant) -> Grid:
    tiles, batch = _tiles(p, variant.rows)
    threads = 32 * variant.simdgroups
    return (tiles * splits_of(p, variant) * threads, p.heads_k, batch), (threads, 1, 1)


_COMBINE_THREADS = 128


def _combine_grid(p: AttentionProblem, variant: Variant) -> Grid:
    tiles, batch = _tiles(p, variant.rows)
    rows = tiles * variant.rows if p.cu_seqlens_q is not None else p.max_seqlen_q * variant.heads_in_tile
    return (rows * _COMBINE_THREADS, p.heads_k, batch), (_COMBINE_THREADS, 1, 1)


_PARTIAL = {"partial_o": "float", "partial_m_l": "float2"}
_PARAMETERS = ("splits", "partial_rows")
_LENGTHS = {"short": 2048, "medium": 16384, "long": 65536}  # of keys: classes of calls


def _length(p: AttentionProblem) -> int:
    """Keys. With one split the shape of the kernel does not depend on those of the other sequences."""
    return _LENGTHS["medium"] if p.num_splits == 1 else p.max_seqlen_k


def _problem(rows: int, key: store.Key, device: torch.device | str, small: bool) -> AttentionProblem:
    """Eight heads that share their keys; of keys so many that there are splits."""
    dtype, generator = getattr(torch, key.dtype), torch.Generator().manual_seed(0)
    batch, keys = (2, 1100) if small else (1, {"short": 1024, "medium": 8192, "long": _LENGTHS["long"]}[key.length])
    queries, heads_k = rows // 8, 1 if small else 4

    def randn(rows: int, heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(batch, rows, heads, head_dim, generator=generator).to(device, dtype)

    q, k = randn(queries, 8 * heads_k, key.head_dim), randn(keys, heads_k, key.head_dim)
    v = randn(keys, heads_k, key.head_dim_v)
    return AttentionProblem(q, k, v, batch, queries, keys, key.head_dim**-0.5)


def _decode(rows: int) -> TunedKernel:
    """The kernel for tiles of so many rows: their variants do not compare."""
    return TunedKernel(
        variants=tuple(
            Variant(rows, 1, slices, units, keys)
            for slices in (1, 2, 4, 8, 16)
            for units in (1, 2, 4, 8)
            for keys in (8, 16, 32)
            if 2 <= slices * units <= 16
        ),
        fits=fits,
        default=lambda *shape: shapes(rows, 1, *shape)[0],
        fallbacks=lambda _variant, *shape: shapes(rows, 1, *shape),
        variable="MTLFLASHATTN_DECODE_VARIANT",
        worth_tuning=lambda variant: variant.simdgroups in (_SIMDGROUPS, 2 * _SIMDGROUPS),
        label=f"of {rows} rows",
        length_of=_length,
        lengths=_LENGTHS,
        problem=functools.partial(_problem, rows),
        run=lambda p, variant: run(p, variant._replace(heads_in_tile=p.heads // p.heads_k)),
        entry="attention_decode",
        headers=("metal_stdlib", "metal_simdgroup_matrix"),
        sources=(
            *launch.LANE_SOURCES,
            "fragment",
            *launch.FORWARD_SOURCES,
            "splits",
            "hidden",
            "slices",
            "exchange",
            "attend",
            "decode",
        ),
        buffers={
            **launch.FORWARD_BUFFERS,
            **{name: Buffer(kind, optional=True) for name, kind in _PARTIAL.items()},
        },
        optional=tuple(OPTIONAL_BUFFERS),
        parameters=_PARAMETERS,
        grid=_grid,
        proof=Proof(decode_trials.decode),
    )


DECODE = {rows: _decode(rows) for rows in ROWS}
COMBINE = Kernel(
    entry="attention_combine",
    headers=("metal_stdlib",),
    sources=("codes", "scoring", "range", "splits", "combine"),
    buffers={
        **{name: Buffer(f"const {kind}") for name, kind in _PARTIAL.items()},
        "out": launch.FORWARD_BUFFERS["out"],
        "lse": launch.FORWARD_BUFFERS["lse"],
    },
    optional=tuple(OPTIONAL_BUFFERS),
    parameters=_PARAMETERS,
    grid=_combine_grid,
    threads=lambda _: _COMBINE_THREADS,
    proof=Proof(decode_trials.combine),
)


def variants(p: AttentionProblem) -> Iterator[Variant]:
    """What to try for `p`, in order."""
    kernel, heads = DECODE[rows_of(p)], p.heads // p.heads_k
    first = choice.chosen(p, kernel)
    yield _with_heads(first, heads)
    for variant in choice.instead(p, kernel, first):
        yield _with_heads(variant, heads)


@functools.lru_cache(maxsize=512)
def _with_heads(variant: Variant, heads_in_tile: int) -> Variant:
    return variant._replace(heads_in_tile=heads_in_tile)


def run(p: AttentionProblem, variant: Variant) -> Result | None:
    """The forward pass. None where a kernel does not compile on this machine."""
    splits = splits_of(p, variant)
    result = launch.outputs(p)
    q, width = p.q, -(-p.v.shape[-1] // 8) * 8
    rows = q.numel() // q.shape[-1]
    parameters = {"splits": splits, "partial_rows": rows}
    if splits == 1:
        partial: dict[str, torch.Tensor | None] = dict.fromkeys(_PARTIAL)
    else:
        partial = {
            "partial_o": q.new_empty((splits, rows, width), dtype=torch.float32),
            "partial_m_l": q.new_empty((splits, rows, 2), dtype=torch.float32),
        }
    outputs = {"out": result.out, "lse": result.lse}
    tensors = {"q": q, "k": p.k, "v": p.v, **outputs, **partial}
    if not launch.enqueue(DECODE[variant.rows], p, variant, tensors, parameters):
        return None
    if splits > 1 and not launch.enqueue(COMBINE, p, variant, {**partial, **outputs}, parameters):
        return None
    return result


def limits(p: AttentionProblem) -> list[str]:
    """Why the tiled kernel is to compute `p`, or why no kernel can.

    With one split neither that nor the shape of the kernel may depend on the other sequences of the batch.
    """
    reasons = launch.limits(p, MAX_HEAD_DIM)
    if p.q.shape[-1] > launch.MAX_HEAD_DIM or p.v.shape[-1] > launch.MAX_HEAD_DIM:
        return reasons  # there is no tiled kernel
    most = few.most(p)
    if p.max_seqlen_q > most:
        reasons.append(f"there are more than {most} queries")
    if p.num_splits == 1:
        if p.cu_seqlens_q is not None:
            reasons.append("queries are packed, and num_splits is 1")
    elif p.max_seqlen_k < MIN_KEYS:
        reasons.append(f"there are less than {MIN_KEYS} keys")
    return reasons


def serve(p: AttentionProblem) -> Result | None:
    """The forward pass, by the variant that is chosen or one in its place. None where none is to be used."""
    for variant in variants(p):
        result = run(p, variant)
        if result is not None:
            return result
    return None


TIER = Tier("decode", SERVES | {"quantised"}, limits, serve, metal=True)
