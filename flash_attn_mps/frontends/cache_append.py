"""Before the attention: queries and new keys are rotated, and new keys and values go into the caches.

In one launch where the kernel does it (`tiers/metal/rotary.py`), else in torch. In place, on the device, and without
waiting for it.
"""

from __future__ import annotations

import torch

from .. import checks, quantised, trace
from ..tiers.metal import rotary as kernel
from ..tiers.metal.movement import NewKeys, Queries, Rotary
from .rotary import rotated


def prepare(new: NewKeys, rotary: Rotary | None, queries: Queries | None) -> None:
    """Append `new`, with its keys rotated if there is `rotary`; then `queries` are rotated too, into their `out`."""
    reasons = kernel.unsupported_reasons(rotary, queries, new)
    if not reasons and not kernel.enqueue(rotary, queries, new):
        reasons = kernel.NOT_COMPILED
    trace.record_step("rows into a cache" if rotary is None else "rotary embedding, rows into a cache", reasons)
    if not reasons:
        return
    k = new.k
    if rotary is not None:
        k = rotated(k, rotary.cos, rotary.sin, rotary.start, new.cu_seqlens, rotary.interleaved)
        if queries is not None:
            queries.out.copy_(_rotated_queries(rotary, queries))
    _append(new, k)
    if new.seqused_k is not None:
        _count(new, new.seqused_k)


def _count(new: NewKeys, seqused_k: torch.Tensor) -> None:
    """How many keys each sequence has with the new ones, without those of leftpad_k."""
    seqused_k.zero_()
    for number in (new.cached, new.k.shape[1] if new.cu_seqlens is None else new.cu_seqlens.diff()):
        seqused_k += number
    if new.leftpad_k is not None:
        seqused_k -= new.leftpad_k


def _rotated_queries(rotary: Rotary, queries: Queries) -> torch.Tensor:
    cos, sin, interleaved, start, _ = rotary
    q, _, cu_seqlens, advances = queries
    if advances:
        return rotated(q, cos, sin, start, cu_seqlens, interleaved)
    if cu_seqlens is None:  # all at one position: as if all were heads of one query
        return rotated(q.flatten(1, 2).unsqueeze(1), cos, sin, start, None, interleaved).view(q.shape)
    if isinstance(start, torch.Tensor):
        start = start[_sequence_of_rows(cu_seqlens, q.shape[0])]
    # As if each query were a sequence.
    return rotated(q.unsqueeze(1), cos, sin, start, None, interleaved).squeeze(1)


def _append(new: NewKeys, k: torch.Tensor) -> None:
    """Write `k`, which is `new.k` rotated, and `new.v` into the caches."""
    device, cached = k.device, new.cached
    if new.cu_seqlens is None:
        sequence, row = torch.arange(k.shape[0], device=device)[:, None], torch.arange(k.shape[1], device=device)
    else:
        sequence = _sequence_of_rows(new.cu_seqlens, k.shape[0])
        row = torch.arange(k.shape[0], device=device) - new.cu_seqlens[sequence]
        if not checks.readable(new.cu_seqlens):
            return _append_some(new, k, sequence, row)
    where = _places(new, sequence, row + (cached if isinstance(cached, int) else cached[sequence]))
    for cache, values in _caches(new, k):
        cache[where] = values


def _caches(new: NewKeys, k: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Each cache and what goes into it: of a quantised one its bytes, and codes."""
    if new.k_cache.dtype is k.dtype:
        return (new.k_cache, k), (new.v_cache, new.v)
    codes = _codes(new, k, new.k_cache, new.k_descale), _codes(new, new.v, new.v_cache, new.v_descale)
    return (new.k_cache.view(torch.uint8), codes[0]), (new.v_cache.view(torch.uint8), codes[1])


def _codes(new: NewKeys, x: torch.Tensor, cache: torch.Tensor, descale: torch.Tensor | None) -> torch.Tensor:
    values = x.to(torch.float32)
    if descale is not None:
        cu_seqlens = new.cu_seqlens
        of_rows = descale[:, None] if cu_seqlens is None else descale[_sequence_of_rows(cu_seqlens, x.shape[0])]
        values = values / of_rows[..., None]
    return quantised.encoded(values, cache.dtype)


def _append_some(new: NewKeys, k: torch.Tensor, sequence: torch.Tensor, row: torch.Tensor) -> None:
    """Append packed rows of which only the device knows how many are new: those behind the last sequence are not.

    Without waiting for it: in their place the last new row is written again, or, where there is none, what is there.
    """
    assert new.cu_seqlens is not None
    count, cached = new.cu_seqlens[-1], new.cached
    taken = torch.arange(k.shape[0], device=k.device).minimum((count - 1).clamp(min=0))
    sequence, row = sequence[taken], row[taken]
    room = new.k_cache.shape[1] * (1 if new.block_table is None else new.block_table.shape[1])
    position = row + (cached if isinstance(cached, int) else cached[sequence])
    first, second = _places(new, sequence, position.clamp(0, room - 1))
    where = first.clamp(0, new.k_cache.shape[0] - 1), second  # without a new row a page may be any number
    for cache, values in _caches(new, k):
        cache[where] = torch.where(count > 0, values[taken], cache[where])


def _places(new: NewKeys, sequence: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices into the first two dimensions of the caches of a sequence's rows at these positions."""
    entry = sequence if new.kv_batch_idx is None else new.kv_batch_idx[sequence]
    if new.block_table is None:
        return entry, position
    block_size = new.k_cache.shape[1]
    return new.block_table[entry, position // block_size], position % block_size


def _sequence_of_rows(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """`(total,)`: to which sequence each packed row belongs; the last one for rows past its end."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp_(max=cu_seqlens.shape[0] - 2)
