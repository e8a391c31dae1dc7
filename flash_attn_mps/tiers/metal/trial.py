"""The small problems on which kernels prove themselves, made from what a kernel is compiled for (`prove.py`).

A problem has what goes wrong when code is compiled wrongly: tails of tiles and blocks, sequences of different lengths
and of none, NaN in memory behind every end and in keys that most queries do not see, queries that see nothing, scores
large enough to show how they are summed, values whose sum overflows float16, blocks that a mask hides or leaves alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ... import quantised
from ...problem import AttentionProblem
from .. import reference
from .specialization import Specialization

_DTYPES = {
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "float": torch.float32,
    "uchar": torch.bool,
}
_CODES = {"e4m3": torch.uint8, "e5m2": torch.float8_e5m2, "int8": torch.int8}  # uint8: MPS has no float8_e4m3fn
# Of sequences by turns: with the second the floats' codes are mostly subnormal numbers, which a GPU might take for 0.
_DESCALES = {"e4m3": (0.5, 2.0**6), "e5m2": (0.5, 2.0**14), "int8": (2.0**-5, 2.0**-4)}

_PAGE = 16
_UNUSED, _BEHIND = 2, 3  # rows that seqused_q, seqused_k leave out of a packed sequence; rows behind the last sequence
_WINDOW_RIGHT = 3
_SOFTCAP = 20.0
# Of every other query of the last head: half a unit in its last place is 6 % of a probability in float16.
_LARGE_SCORE = 256.0
_LARGE_K = 2.0
_LARGE_V, _SPREAD_V = 8000.0, 2000.0  # of the last column of v: the sum of nine exceeds float16
_DROPOUT, _SEED = 0.25, 0x123456789ABCDEF
_NAN = float("nan")
_CPU = torch.device("cpu")


class Expected(NamedTuple):
    """What a tensor should hold, and by how much rounding may change that (broadcasts). On the CPU.

    `of`: what is held against `value` instead of the tensor, made of all tensors that are expected to be written.
    """

    value: torch.Tensor
    allowed: torch.Tensor | float
    of: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None


class Trial(NamedTuple):
    """One launch of a kernel, and what it must come to. All tensors are on the CPU; `prove` moves them.

    `tensors`: the kernel's own buffers, outputs included (`unwritten`). `expected`: of those that it writes.
    """

    problem: AttentionProblem
    tensors: Mapping[str, torch.Tensor | None]
    expected: Mapping[str, Expected]
    parameters: Mapping[str, int] = MappingProxyType({})


def forward(s: Specialization, seqlen_q: int, seqlen_k: int, *, heads: int = 2) -> Trial:
    """A launch with `launch.FORWARD_BUFFERS`: see `problem`."""
    p = problem(s, seqlen_q, seqlen_k, heads=heads)
    exact = reference.run(in_fp32(p))
    assert exact.lse is not None
    expected, to = {"out": Expected(exact.out, allowed(p))}, outputs(p)
    if "lse" in s.buffers:
        expected["lse"] = Expected(exact.lse, 2e-5 * (1.0 + exact.lse.nan_to_num(0.0, 0.0, 0.0).abs()))
    else:
        to["lse"] = None
    return Trial(p, {"q": p.q, "k": p.k, "v": p.v, **to}, expected)


def outputs(p: AttentionProblem) -> dict[str, torch.Tensor | None]:
    """`out` and `lse`, which nobody has written."""
    return {"out": unwritten(p.out_shape, p.q.dtype), "lse": unwritten(p.lse_shape, torch.float32)}


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for an output: NaN, which nobody takes for a result."""
    return torch.full(shape, _NAN, dtype=dtype, device=_CPU)


def in_fp32(p: AttentionProblem) -> AttentionProblem:
    """The same problem for the tier `torch`."""
    mask = p.mask if p.mask is None or p.mask.dtype == torch.bool else p.mask.float()
    k, v = (x if x.dtype in quantised.FORMATS else x.float() for x in (p.k, p.v))
    return dataclasses.replace(p, q=p.q.float(), k=k, v=v, mask=mask, want_lse=True)


def allowed(p: AttentionProblem) -> torch.Tensor:
    """How far each element of the output may be off, `(heads, head_dim of v)`.

    As in the self-test, and in addition the rounding of sums as large as those of the last head, in any order.
    """
    v = quantised.decoded(p.v) if p.v.dtype in quantised.FORMATS else p.v.float()
    largest = v.nan_to_num(0.0).abs().flatten(0, -2).amax(0) / (1.0 - p.dropout_p)
    if p.v_descale is not None:
        largest = largest * p.v_descale.max()
    sums = p.q[..., 0].float().nan_to_num(0.0).abs().flatten(0, -2).amax(0) * _LARGE_K + 6 * p.q.shape[-1] ** 0.5
    of_scores = float(p.softmax_scale) * sums * p.q.shape[-1] ** 0.5 * 2.0**-22
    return (2 * torch.finfo(p.q.dtype).eps + of_scores[:, None]) * largest + 2e-5


def scores_are_scaled(p: AttentionProblem) -> bool:
    """Do kernels scale a score before the softmax? SCORES_ARE_SCALED in scoring.metal."""
    return p.softcap > 0 or p.alibi_slopes is not None or (p.mask is not None and p.mask.dtype != torch.bool)


def lengths_of_rows(p: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row of q, flat: is it a query, and how many keys has its sequence?"""
    starts = p.cu_seqlens_q.tolist() if p.cu_seqlens_q is not None else [p.max_seqlen_q * b for b in range(p.batch + 1)]
    exists = torch.zeros(p.q.shape[:-2].numel(), dtype=torch.bool, device=_CPU)
    keys = torch.zeros(exists.shape, dtype=torch.int64, device=_CPU)
    of_k = [p.max_seqlen_k] * p.batch if p.cu_seqlens_k is None else p.cu_seqlens_k.diff().tolist()
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        count = end - start if p.seqused_q is None else min(end - start, int(p.seqused_q[b]))
        exists[start : start + count] = True
        keys[start:end] = of_k[b] if p.seqused_k is None else min(of_k[b], int(p.seqused_k[b]))
    return exists, keys


def problem(s: Specialization, seqlen_q: int, seqlen_k: int, *, seen: bool = True, heads: int = 2) -> AttentionProblem:
    """A problem whose kernel is specialised as `s`, if its other tensors of rows are contiguous or made by `rows`.

    seqlen_q, seqlen_k: of the longest sequence; the others have fewer where `s` knows of lengths. `seen`: does some
    query see values that are NaN or very large? A gradient would be nothing else then. `heads`: of one KV head.
    """
    generator = torch.Generator(_CPU).manual_seed(0)
    has = frozenset(s.buffers)
    ragged_q, ragged_k = (not has.isdisjoint({f"cu_seqlens_{x}", f"seqused_{x}"}) for x in "qk")
    batch = 3 if ragged_q or ragged_k else 2
    lengths_q = [seqlen_q, min(seqlen_q, 21), min(seqlen_q, 3)] if ragged_q else [seqlen_q] * batch
    lengths_k = [seqlen_k, seqlen_k // 2 + 1, 0] if ragged_k else [seqlen_k] * batch
    scale = 2.0 ** -((s.head_dim.bit_length() - 1) // 2)
    places_q, shape_q, tensors = _queries(has, lengths_q)
    places_k, shape_k, of_keys = _keys(has, lengths_k)
    tensors |= of_keys
    # Of the memory that a sequence has, also where it does not use all of it.
    longest = [
        max(lengths) + (_UNUSED if {f"cu_seqlens_{x}", f"seqused_{x}"} <= has else 0)
        for x, lengths in (("q", lengths_q), ("k", lengths_k))
    ]
    dtype = _DTYPES[s.dtype]
    q = rows((*shape_q, heads, s.head_dim), s.vector, dtype)
    kv_dtype = _CODES[s.kv_format] if s.kv_format else dtype
    k = rows((*shape_k, 1, s.head_dim), s.vector, kv_dtype)
    v = rows((*shape_k, 1, s.head_dim_v), s.vector_v, kv_dtype)
    descales = torch.tensor(_DESCALES.get(s.kv_format, (1.0,)) * batch, device=_CPU)[:batch, None]
    tensors |= {name: descales for name in ("k_descale", "v_descale") if name in has}
    strange = [_strange_key(s, n, seen) for n in lengths_k]
    for b in range(batch):
        of_q = _normal(generator, lengths_q[b], heads, s.head_dim)
        of_q[1::2, -1, 0] = _LARGE_SCORE / _LARGE_K / scale
        of_k = _normal(generator, lengths_k[b], 1, s.head_dim)
        of_k[..., 0] = _LARGE_K
        of_v = _normal(generator, lengths_k[b], 1, s.head_dim_v)
        if s.head_dim_v > 1 and seen and not s.kv_format:
            of_v[..., -1] = _LARGE_V + _SPREAD_V * of_v[..., -1]
        key = strange[b]
        if key is not None:
            of_k[key] = of_v[key] = _NAN
        if s.head_dim_v > 2 and lengths_k[b] > 4 and seen:
            of_v[-2, :, 1] = _NAN
        q[places_q[b]] = of_q.to(dtype)
        for x, of_x, descale in ((k, of_k, "k_descale"), (v, of_v, "v_descale")):
            x[places_k[b]] = _rounded(of_x, kv_dtype, descales[b, 0] if descale in has else 1.0)
    if "alibi_slopes" in has:
        tensors["alibi_slopes"] = 2.0 ** -torch.arange(1.0, 1 + batch * heads, dtype=torch.float32, device=_CPU).view(
            batch, -1
        )
    if "sinks" in has:
        tensors["sinks"] = _normal(generator, heads)
    if "softmax_scale" in has:
        tensors["softmax_scale"] = torch.tensor(scale, dtype=_DTYPES[s.scale_type], device=_CPU)
    if s.mask is not None:
        mask = _mask(s, (batch, longest[0], longest[1]), strange, seen, generator)
        tensors["mask"] = mask.expand(batch, heads, *mask.shape[2:])
    fields: dict[str, Any] = {"softmax_scale": scale, **tensors}
    return AttentionProblem(
        q=q,
        k=k if "block_table" in has or "cu_seqlens_k" in has else k[:, :-_BEHIND],
        v=v if "block_table" in has or "cu_seqlens_k" in has else v[:, :-_BEHIND],
        **fields,
        batch=batch,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        window_left=seqlen_k // 3 if s.left else -1,
        window_right=_WINDOW_RIGHT if s.right else -1,
        softcap=_SOFTCAP if s.softcap else 0.0,
        dropout_p=_DROPOUT if s.dropout else 0.0,
        seed=_SEED if s.dropout else 0,
        want_lse="lse" in has,
    )


def rows(shape: tuple[int, ...], aligned: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of that shape, on the CPU, whose rows are aligned to just so many elements; NaN, gaps between rows too."""
    pitch = -(-shape[-1] // aligned) * aligned + aligned
    if pitch % (2 * aligned) == 0 and aligned * dtype.itemsize < 16:
        pitch += aligned
    if dtype in quantised.FORMATS:  # of the floats the code is that of NaN
        codes = torch.full((*shape[:-1], pitch), 127, dtype=torch.uint8, device=_CPU)
        return codes.view(dtype)[..., : shape[-1]]
    return torch.full((*shape[:-1], pitch), _NAN, dtype=dtype, device=_CPU)[..., : shape[-1]]


def _rounded(values: torch.Tensor, dtype: torch.dtype, descale: torch.Tensor | float) -> torch.Tensor:
    if dtype in quantised.FORMATS:
        return quantised.encoded(values / descale, dtype).view(dtype)
    return (values / descale).to(dtype)


def _strange_key(s: Specialization, seqlen_k: int, seen: bool) -> int | None:
    """A key of NaN that few queries see, or none if it must not be `seen`; None where there is no such key."""
    hideable = s.mask is not None and not s.mask.columns_are_one
    if seqlen_k < 5 or not (seen or hideable):
        return None
    if s.right:
        return seqlen_k - 1
    if s.left:
        return 0
    return seqlen_k // 2 if hideable else None


def _queries(has: frozenset[str], lengths: list[int]) -> tuple[list[Any], tuple[int, ...], dict[str, torch.Tensor]]:
    """Where each sequence's rows of q are, the shape of all rows, and the tensors that say so."""
    used = {"seqused_q": _int32(lengths)} if "seqused_q" in has else {}
    if "cu_seqlens_q" not in has:
        return [(b, slice(0, n)) for b, n in enumerate(lengths)], (len(lengths), max(lengths)), used
    places, starts = _packed(lengths, _UNUSED if used else 0)
    return places, (starts[-1] + _BEHIND,), {**used, "cu_seqlens_q": _int32(starts)}


def _keys(has: frozenset[str], lengths: list[int]) -> tuple[list[Any], tuple[int, ...], dict[str, torch.Tensor]]:
    """Likewise of k and v."""
    batch = len(lengths)
    tensors = {"seqused_k": _int32(lengths)} if "seqused_k" in has else {}
    pads = [3, 1, 0][:batch] if "leftpad_k" in has else [0] * batch
    if any(pads):
        tensors["leftpad_k"] = _int32(pads)
    if "block_table" in has:
        if "cu_seqlens_k" in has:
            tensors["cu_seqlens_k"] = _int32(_packed(lengths, 0)[1])
        blocks = max(pad + n for pad, n in zip(pads, lengths, strict=True)) // _PAGE + 1
        pages = torch.arange(batch * blocks, device=_CPU).flip(0).view(batch, blocks)
        tensors["block_table"] = pages.int()
        positions = [torch.arange(pad, pad + n, device=_CPU) for pad, n in zip(pads, lengths, strict=True)]
        in_pages = [(pages[b, at // _PAGE], at % _PAGE) for b, at in enumerate(positions)]
        return in_pages, (batch * blocks + 1, _PAGE), tensors
    if "cu_seqlens_k" in has:
        places, starts = _packed(lengths, _UNUSED if "seqused_k" in has else 0)
        return places, (starts[-1] + _BEHIND,), {**tensors, "cu_seqlens_k": _int32(starts)}
    entries = list(range(batch))
    if "kv_batch_idx" in has:
        entries = [batch - b for b in range(batch)]
        tensors["kv_batch_idx"] = _int32(entries)
    dense = [(e, slice(pad, pad + n)) for e, pad, n in zip(entries, pads, lengths, strict=True)]
    return dense, (max(entries) + 1, max(lengths) + max(pads) + _BEHIND), tensors


def _packed(lengths: list[int], unused: int) -> tuple[list[Any], list[int]]:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n + unused)
    return [slice(start, start + n) for start, n in zip(starts, lengths, strict=False)], starts


def _mask(
    s: Specialization, shape: tuple[int, int, int], strange: list[int | None], seen: bool, generator: torch.Generator
) -> torch.Tensor:
    """`(batch, 1, queries, keys)` in memory as `s.mask` has it: blocks hidden and unaltered, a row of nothing."""
    assert s.mask is not None
    batch, queries, keys = shape
    kind, dtype = s.mask, _DTYPES[s.mask.type]
    row_count, column_count = (1 if kind.rows_are_one else queries), (1 if kind.columns_are_one else keys)
    shown = torch.rand((batch, row_count, column_count), generator=generator, device=_CPU) > 0.3
    values = torch.randn((batch, row_count, column_count), generator=generator, device=_CPU)
    if column_count > 1:
        shown[:, : row_count // 2, column_count // 3 : 2 * column_count // 3] = False
        shown[:, row_count // 2 :, : column_count // 3] = True
        values[:, row_count // 2 :, : column_count // 3] = 0.0
        for b, key in enumerate(strange):
            if key is not None:
                shown[b, :, key] = False
                shown[b, 1:2, key] = seen
    if row_count > 1:
        shown[:, row_count // 2 + 1] = False
    elif column_count == 1:
        shown[0] = True
    elements = shown if dtype == torch.bool else values.masked_fill_(~shown, -torch.inf).to(dtype)
    return _stored(elements, kind.aligned)[:, None].expand(batch, 1, queries, keys)


def _stored(mask: torch.Tensor, aligned: int) -> torch.Tensor:
    """`mask` (batch, rows, columns) with rows aligned to that many bytes, 0: not even neighbours."""
    batch, row_count, column_count = mask.shape
    if column_count > 1 and not aligned:
        columns_first = torch.ones((batch, column_count, row_count + 1), dtype=mask.dtype, device=_CPU)
        return columns_first[..., :row_count].transpose(1, 2).copy_(mask)
    step = max(1, aligned // mask.itemsize)
    pitch = -(-column_count // step) * step
    if aligned < 16 and column_count > 1 and pitch % (2 * step) == 0:
        pitch += step
    return torch.ones((batch, row_count, pitch), dtype=mask.dtype, device=_CPU)[..., :column_count].copy_(mask)


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=_CPU)


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=_CPU)
