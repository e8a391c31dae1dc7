"""The trial of the kernel that rotates and appends (`rotary.py`): three sequences, each with rows at another place.

`made` gives the fields of `Rotary`, `Queries` and `NewKeys`, on the CPU, and what the kernel must write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ... import quantised
from .prove import Expected
from .trial import CODES, DTYPES, rows, unwritten

_BATCH, _HEADS, _HEADS_K = 3, 3, 2
_NEW = (3, 1, 4)  # queries and new keys of each sequence, where they are packed; else the first
_STARTS, _CACHED, _LEFTPAD = (7, 0, 20), (5, 0, 9), (1, 0, 2)  # of each, where there is a tensor; else the first
_POSITIONS, _PAGE, _PAGES = 40, 8, 3
_EXACT = 1e-30  # allowed of what is copied


class Made(NamedTuple):
    """Fields by name; None where there are none of the kind."""

    rotary: dict[str, Any] | None
    queries: dict[str, Any] | None
    new: dict[str, Any] | None
    expected: Mapping[str, Expected]


def made(m: Any) -> Made:
    """Of a `Movement`."""
    generator = torch.Generator("cpu").manual_seed(0)
    has, rotary, queries, new = frozenset(m.buffers), None, None, None
    expected: dict[str, Expected] = {}
    if "cosines" in has:
        angles = torch.rand((_POSITIONS, m.rotary_dim // 2), generator=generator, device="cpu") * 6.28
        cos, sin = (table.to(DTYPES[m.table]) for table in (angles.cos(), angles.sin()))
        start = torch.tensor(_STARTS, dtype=DTYPES[m.start], device="cpu") if "start" in has else _STARTS[0]
        rotary = {"cos": cos, "sin": sin, "interleaved": m.interleaved, "start": start}
    if "q" in has:
        sequences, cu_seqlens = _sequences(DTYPES[m.cu_seqlens] if "cu_seqlens_q" in has else None)
        q = _filled(sequences, _HEADS, m.head_dim, m, generator, cu_seqlens is not None)
        queries = {"q": q, "out": unwritten(tuple(q.shape), q.dtype), "cu_seqlens": cu_seqlens}
        expected["rotated_q"] = Expected(_rotated(q, sequences, m, rotary), _rounding(q.dtype))
    if "k" in has:
        sequences, cu_seqlens = _sequences(torch.int32 if "cu_seqlens_k_new" in has else None)
        k, v = (
            _filled(sequences, _HEADS_K, dim, m, generator, cu_seqlens is not None)
            for dim in (m.head_dim, m.head_dim_v)
        )
        new = {"k": k, "v": v, "cu_seqlens": cu_seqlens, **_caches(m, has)}
        _expect_rows(expected, m, new, sequences, _rotated(k, sequences, m, rotary))
    return Made(rotary, queries, new, expected)


def _sequences(dtype: torch.dtype | None) -> tuple[list[tuple[Any, int]], torch.Tensor | None]:
    """Where the rows of each sequence are, and how many; cu_seqlens of that dtype where they are packed."""
    if dtype is None:
        return [(b, _NEW[0]) for b in range(_BATCH)], None
    starts = [0, _NEW[0], _NEW[0] + _NEW[1], sum(_NEW)]
    cu_seqlens = torch.tensor(starts, dtype=dtype, device="cpu")
    return [(slice(starts[b], starts[b + 1]), _NEW[b]) for b in range(_BATCH)], cu_seqlens


def _filled(
    sequences: list[tuple[Any, int]], heads: int, dim: int, m: Any, generator: torch.Generator, packed: bool
) -> torch.Tensor:
    shape = (sum(_NEW), heads, dim) if packed else (_BATCH, _NEW[0], heads, dim)
    x = rows(shape, m.pairs, DTYPES[m.dtype])
    return x.copy_(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))


def _caches(m: Any, has: frozenset[str]) -> dict[str, Any]:
    paged = "block_table" in has
    shape = (_PAGES * (_BATCH + 1) + 1, _PAGE) if paged else (_BATCH + 1, _PAGE * _PAGES)
    dtype = CODES[m.kv_format] if m.kv_format else DTYPES[m.dtype]
    fields: dict[str, Any] = {
        "k_cache": rows((*shape, _HEADS_K, m.head_dim), m.pairs, dtype),
        "v_cache": rows((*shape, _HEADS_K, m.head_dim_v), m.pairs, dtype),
        "cached": torch.tensor(_CACHED, dtype=torch.int32, device="cpu") if "cached" in has else _CACHED[0],
    }
    if paged:
        pages = torch.arange(_PAGES * (_BATCH + 1), dtype=torch.int32, device="cpu").flip(0)
        fields["block_table"] = pages.view(_BATCH + 1, _PAGES)
    if "kv_batch_idx" in has:
        fields["kv_batch_idx"] = torch.tensor([3, 0, 2], dtype=torch.int32, device="cpu")
    if "seqused_k" in has:
        fields["seqused_k"] = torch.full((_BATCH,), -1, dtype=torch.int32, device="cpu")
    if "leftpad_k" in has:
        fields["leftpad_k"] = torch.tensor(_LEFTPAD, dtype=torch.int32, device="cpu")
    unit = 2.0**-5 if m.kv_format == "int8" else 0.5
    for name in {"k_descale", "v_descale"} & has:
        fields[name] = unit * 2.0 ** torch.arange(_BATCH * _HEADS_K, dtype=torch.float32, device="cpu").view(_BATCH, -1)
    return fields


def _rotated(
    x: torch.Tensor, sequences: list[tuple[Any, int]], m: Any, rotary: Mapping[str, Any] | None
) -> torch.Tensor:
    """x in float32, its first rotary_dim elements rotated by the position of the row."""
    out = x.to(torch.float32, copy=True)
    if rotary is None:
        return out
    half = m.rotary_dim // 2
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if m.interleaved else (slice(0, half), slice(half, 2 * half))
    )
    for b, (place, count) in enumerate(sequences):
        at = (_STARTS[b] if isinstance(rotary["start"], torch.Tensor) else _STARTS[0]) + torch.arange(count)
        cos, sin = (rotary[name].float()[at][:, None] for name in ("cos", "sin"))
        x0, x1 = out[place][..., first].clone(), out[place][..., second].clone()
        out[place][..., first], out[place][..., second] = x0 * cos - x1 * sin, x0 * sin + x1 * cos
    return out


def _rounding(dtype: torch.dtype) -> float:
    return 16 * torch.finfo(dtype).eps  # of the largest numbers here


def _expect_rows(
    expected: dict[str, Expected],
    m: Any,
    new: Mapping[str, Any],
    sequences: list[tuple[Any, int]],
    k: torch.Tensor,
) -> None:
    """What the caches hold then, and the counts of their keys."""
    cached = [_CACHED[b] if isinstance(new["cached"], torch.Tensor) else _CACHED[0] for b in range(_BATCH)]
    entries = new["kv_batch_idx"].tolist() if "kv_batch_idx" in new else list(range(_BATCH))
    for name, values in (("k", k), ("v", new["v"].float())):
        cache = new[f"{name}_cache"]
        held = _decoded(cache)
        steps = torch.full_like(held, _EXACT if name == "v" or not m.rotary_dim else _rounding(new["k"].dtype))
        for b, (place, count) in enumerate(sequences):
            positions = torch.arange(cached[b], cached[b] + count)
            at: Any = (entries[b], positions)
            if "block_table" in new:
                at = (new["block_table"][entries[b]].long()[positions // _PAGE], positions % _PAGE)
            descale = new[f"{name}_descale"][b][:, None] if f"{name}_descale" in new else 1.0
            held[at], steps[at] = _stored(values[place], m, descale, steps[at])
        expected[f"{name}_cache"] = Expected(held, steps, _reader(f"{name}_cache"))
    if "seqused_k" in new:
        pads = new["leftpad_k"].tolist() if "leftpad_k" in new else [0] * _BATCH
        counts = [cached[b] + count - pads[b] for b, (_, count) in enumerate(sequences)]
        expected["seqused_k"] = Expected(torch.tensor(counts, device="cpu"), _EXACT)


def _stored(values: torch.Tensor, m: Any, descale: Any, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache holds of `values`, and by how much it may differ: by a step of a code, if it has codes."""
    dtype = DTYPES[m.dtype]
    if not m.kv_format:
        return values.to(dtype).float(), step
    codes = CODES[m.kv_format]
    held = quantised.decoded(quantised.encoded(values.to(dtype).float() / descale, codes).view(codes))
    mantissa = quantised.FORMATS[codes].mantissa
    return held, held.abs() * 2.0**-mantissa + 2.0**-6 if mantissa else torch.ones_like(held)


def _decoded(cache: torch.Tensor) -> torch.Tensor:
    return quantised.decoded(cache) if cache.dtype in quantised.FORMATS else cache.to(torch.float32, copy=True)


def _reader(name: str) -> Any:
    return lambda written: _decoded(written[name])
