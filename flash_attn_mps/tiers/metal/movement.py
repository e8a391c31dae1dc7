"""What the kernel of `rotary.py` is given, compiled for and called with.

Each of three arguments may be None: without `Rotary` nothing is rotated, without `Queries` no queries are, and without
`NewKeys` nothing is appended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ... import quantised
from .kernel import Program
from .launch import TYPES
from .specialization import declarations, of_kv_format, source_of


class Rotary(NamedTuple):
    """A rotation by position."""

    cos: torch.Tensor  # (positions, rotary_dim / 2)
    sin: torch.Tensor
    interleaved: bool
    start: int | torch.Tensor  # the position of each sequence's first query and first new key: one, or (batch,)
    backwards: bool = False


class Queries(NamedTuple):
    """What is rotated into another tensor, or in place."""

    q: torch.Tensor  # (batch, seqlen_q, heads, head_dim), or packed with cu_seqlens
    out: torch.Tensor  # likewise
    cu_seqlens: torch.Tensor | None = None  # (batch + 1,)
    advances: bool = True  # does the second query have the next position? Else all have the first one


class NewKeys(NamedTuple):
    """What goes into the caches. Their dtype is that of k and v, or one of quantised.FORMATS."""

    k: torch.Tensor  # (batch, seqlen_new, heads_k, head_dim), or packed with cu_seqlens
    v: torch.Tensor
    k_cache: torch.Tensor  # (entries, seqlen, heads_k, head_dim), or pages with block_table
    v_cache: torch.Tensor
    cu_seqlens: torch.Tensor | None  # (batch + 1,)
    cached: int | torch.Tensor  # rows that each sequence has there: one number, or (batch,)
    kv_batch_idx: torch.Tensor | None = None  # (batch,): the entry of a sequence, or its row of block_table
    block_table: torch.Tensor | None = None  # (rows, blocks per sequence)
    leftpad_k: torch.Tensor | None = None  # (batch,)
    seqused_k: torch.Tensor | None = None  # (batch,): filled with the number of keys then, without those of leftpad_k
    k_descale: torch.Tensor | None = None  # (batch, heads_k), of a quantised cache
    v_descale: torch.Tensor | None = None


_THREADS = 256  # of a group, at most: max_total_threads_per_threadgroup
_PAIRS = 4  # of a thread, at most

# Metal's types of the buffers, in the order of the arguments; those that are None are left out. What begins with
# "const" is among the inputs of functions.
_BUFFERS = {
    "q": "const T",
    "rotated_q": "T",
    "k": "const T",
    "v": "const T",
    "k_cache": "KV_T",
    "v_cache": "KV_T",
    "seqused_k": "int",
    "cosines": "const TABLE_T",
    "sines": "const TABLE_T",
    "start": "const START_T",
    "cu_seqlens_q": "const CU_SEQLENS_T",
    "cu_seqlens_k_new": "const int",
    "cached": "const int",
    "kv_batch_idx": "const int",
    "block_table": "const int",
    "leftpad_k": "const int",
    "k_descale": "const float",
    "v_descale": "const float",
}


def _strides(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{axis}" for name in names for axis in ("batch", "row", "head"))


# Names of the parameters: of every launch, and of those with queries, new keys, a rotation.
_OF_QUERIES = ("heads_q", "rows_q", "seqlen_q", "advance", *_strides("q", "rotated_q"))
_OF_NEW_KEYS = (
    *("heads_k", "rows_new", "seqlen_new", "cached", "room", "entries", "page_size", "block_table_row"),
    *("block_table_rows", "k_descale_batch", "k_descale_head", "v_descale_batch", "v_descale_head"),
    *_strides("k", "v", "k_cache", "v_cache"),
)
_OF_ROTARY = ("positions", "cosines_row", "sines_row", "start", "sign")
_PARAMETERS = ("batch", *_OF_QUERIES, *_OF_NEW_KEYS, *_OF_ROTARY)
_NO_QUERIES, _NO_NEW_KEYS, _NO_ROTARY = ((0,) * len(names) for names in (_OF_QUERIES, _OF_NEW_KEYS, _OF_ROTARY))


class Movement(NamedTuple):
    """What the kernel is compiled for."""

    kernel: Program
    dtype: str  # Metal's names of types
    kv_format: str
    table: str
    start: str
    cu_seqlens: str
    head_dim: int
    head_dim_v: int
    rotary_dim: int
    interleaved: bool
    pairs: int  # of a thread: rows are aligned to as many elements
    buffers: tuple[str, ...]  # that are given

    @property
    def threads(self) -> int:
        """Of a group, at most."""
        return _THREADS

    def source(self) -> str:
        """The Metal source, ASCII."""
        defines = {
            "T": self.dtype,
            "T_IS_HALF": int(self.dtype == "half"),
            "T_IS_BFLOAT": int(self.dtype == "bfloat"),
            **of_kv_format(self.kv_format),
            "TABLE_T": self.table,
            "START_T": self.start,
            "CU_SEQLENS_T": self.cu_seqlens,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "MAX_DIM": max(self.head_dim, self.head_dim_v),
            "ROTARY_DIM": self.rotary_dim,
            "INTERLEAVED": int(self.interleaved),
            "PAIRS": self.pairs,
            **{f"HAS_{name.upper()}": int(name in self.buffers) for name in _BUFFERS},
        }
        types = {name: f"device {_BUFFERS[name]}*" for name in self.buffers} | {"params": "constant long*"}
        inputs = [
            "params",
            *(name for name in self.buffers if _BUFFERS[name].startswith("const") and name not in "qkv"),
        ]
        return source_of(self.kernel, defines, declarations(types, inputs, [name.upper() for name in _PARAMETERS]))


def arguments(
    program: Program, rotary: Rotary | None, queries: Queries | None, new: NewKeys | None
) -> tuple[Movement, list[Any], tuple[int, int], tuple[int, int]]:
    """What the kernel is compiled for, what it is called with, how many threads it has, and how many a group."""
    given: dict[str, torch.Tensor] = {}
    of_queries, of_new_keys, of_rotary = _NO_QUERIES, _NO_NEW_KEYS, _NO_ROTARY
    batch = heads = rows = head_dim = head_dim_v = rotary_dim = 0
    dtype: Any = None
    kv_format, table, start_type, cu_seqlens_type, interleaved = "", "float", "int", "int", False
    aligned: Any = _PAIRS  # offsets, strides and dims, or-ed: the lowest bit set is what all are a multiple of
    if queries is not None:
        q, out, cu_seqlens, advances = queries
        given["q"], (q_steps, aligned_q) = _rows(q)
        given["rotated_q"], (out_steps, aligned_out) = out, _layout(out)
        shape, dtype = q.shape, q.dtype
        if cu_seqlens is None:
            batch, seqlen, heads, head_dim = shape
            rows = batch * seqlen
        else:
            rows, heads, head_dim = shape
            batch, seqlen = cu_seqlens.shape[0] - 1, 0
            given["cu_seqlens_q"], cu_seqlens_type = _contiguous(cu_seqlens), TYPES[cu_seqlens.dtype]
        of_queries = (heads, rows, seqlen, int(advances), *q_steps, *out_steps)
        aligned |= aligned_q | aligned_out
        if rotary is not None and out is q:  # the rest is where it belongs
            head_dim = 2 * rotary.cos.shape[1]
    if new is not None:
        batch, of_new_keys, aligned_new = _of_new_keys(new, given)
        aligned |= aligned_new
        heads, rows = heads + 2 * of_new_keys[0], max(rows, of_new_keys[1])
        dtype, head_dim, head_dim_v = new.k.dtype, new.k.shape[-1], new.v.shape[-1]
        if new.k_cache.dtype is not dtype:
            kv_format = quantised.FORMATS[new.k_cache.dtype].name
    if rotary is not None:
        cos, sin, interleaved, start, backwards = rotary
        (positions, half), (cos_row, cos_column), (sin_row, sin_column) = cos.shape, cos.stride(), sin.stride()
        if cos_column != 1 or sin_column != 1:
            cos, sin, cos_row, sin_row = cos.contiguous(), sin.contiguous(), half, half
        given["cosines"], given["sines"] = cos, sin
        rotary_dim, table = 2 * half, TYPES[cos.dtype]
        if isinstance(start, torch.Tensor):
            given["start"], start_type, start = _contiguous(start), TYPES[start.dtype], 0
        of_rotary = (positions, cos_row, sin_row, start, -1 if backwards else 1)
        offsets: Any = cos.storage_offset(), sin.storage_offset()
        aligned |= offsets[0] | offsets[1] | cos_row | sin_row | half
    aligned |= head_dim | head_dim_v
    pairs = aligned & -aligned
    threads = rows * -(-max(head_dim, head_dim_v) // (2 * pairs))
    if "seqused_k" in given:
        heads, threads = heads + 1, max(threads, batch)
    movement = Movement(
        program,
        TYPES[dtype],
        kv_format,
        table,
        start_type,
        cu_seqlens_type,
        head_dim,
        head_dim_v,
        rotary_dim,
        interleaved,
        pairs,
        tuple(given),
    )
    wide = min(threads, _THREADS) or 1
    values = [*given.values(), [batch, *of_queries, *of_new_keys, *of_rotary]]
    return movement, values, (threads, heads), (wide, _THREADS // wide)


def _of_new_keys(new: NewKeys, given: dict[str, torch.Tensor]) -> tuple[int, tuple[int, ...], int]:
    """The number of sequences, the parameters `_OF_NEW_KEYS` and what rows are aligned to; buffers go to `given`."""
    k, v, k_cache, v_cache, cu_seqlens, cached, kv_batch_idx, block_table, leftpad_k, seqused_k, *descales = new
    given["k"], (k_steps, aligned_k) = _rows(k)
    given["v"], (v_steps, aligned_v) = _rows(v)
    k_cache_steps, aligned_k_cache = _layout(k_cache)
    v_cache_steps, aligned_v_cache = _layout(v_cache)
    given["k_cache"], given["v_cache"] = k_cache, v_cache
    entries, room, heads, _ = k_cache.shape
    page_size = table_row = table_rows = 0
    if cu_seqlens is None:
        batch, seqlen, _, _ = k.shape
        rows = batch * seqlen
    else:
        batch, seqlen, rows = cu_seqlens.shape[0] - 1, 0, k.shape[0]
        given["cu_seqlens_k_new"] = _contiguous(cu_seqlens)
    if isinstance(cached, torch.Tensor):
        given["cached"], cached = _contiguous(cached), 0
    if kv_batch_idx is not None:
        given["kv_batch_idx"] = _contiguous(kv_batch_idx)
    if block_table is not None:
        given["block_table"] = _contiguous(block_table)
        page_size, (table_rows, table_row) = room, block_table.shape
        room = page_size * table_row
    if seqused_k is not None:
        given["seqused_k"] = seqused_k
        if leftpad_k is not None:
            given["leftpad_k"] = _contiguous(leftpad_k)
    of_descales: tuple[int, ...] = ()
    for name, descale in zip(("k_descale", "v_descale"), descales, strict=True):
        of_descales += (0, 0) if descale is None else descale.stride()
        if descale is not None:
            given[name] = descale
    sizes = (heads, rows, seqlen, cached, room, entries, page_size, table_row, table_rows, *of_descales)
    aligned = aligned_k | aligned_v | aligned_k_cache | aligned_v_cache
    return batch, (*sizes, *k_steps, *v_steps, *k_cache_steps, *v_cache_steps), aligned


def _contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_contiguous() else t.contiguous()


def _rows(t: torch.Tensor) -> tuple[torch.Tensor, tuple[tuple[int, int, int], int]]:
    """`t` with the elements of a row next to each other, and its layout."""
    if t.stride(-1) != 1:
        t = t.contiguous()
    return t, _layout(t)


def _layout(t: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """Strides of the batch (0 if packed), of rows and of heads; and those or-ed with the offset."""
    strides = t.stride()
    offset: Any = t.storage_offset()
    batch, row, head, _ = strides if len(strides) == 4 else (0, *strides)
    return (batch, row, head), offset | batch | row | head
