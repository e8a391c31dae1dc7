"""New keys and values go into the caches: in place, on the device, behind the rows of each sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..lengths import Rows
from .cache_call import CacheCall


class NewRows(NamedTuple):
    """The rows that go into the caches, behind those of each sequence."""

    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor | None
    rows: Rows


def append(call: CacheCall, cached: int | torch.Tensor, new: NewRows, k: torch.Tensor) -> None:
    """Write `k`, which is `new.k` rotated, and `new.v` into the caches behind `cached` rows of each sequence."""
    device = k.device
    if new.cu_seqlens is None:
        sequence, row = torch.arange(k.shape[0], device=device)[:, None], torch.arange(k.shape[1], device=device)
    else:
        sequence = sequence_of_rows(new.cu_seqlens, k.shape[0])
        row = torch.arange(k.shape[0], device=device) - new.cu_seqlens[sequence]
        if new.rows.known is None:
            return _append_some(call, cached, new, k, sequence, row)
    where = _places(call, sequence, row + (cached if isinstance(cached, int) else cached[sequence]))
    call.k_cache[where], call.v_cache[where] = k, new.v


def _append_some(
    call: CacheCall,
    cached: int | torch.Tensor,
    new: NewRows,
    k: torch.Tensor,
    sequence: torch.Tensor,
    row: torch.Tensor,
) -> None:
    """Append packed rows of which only the device knows how many are new: those behind the last sequence are not.

    Without waiting for it: in their place the last new row is written again, or, where there is none, what is there.
    """
    assert new.cu_seqlens is not None
    count = new.cu_seqlens[-1]
    taken = torch.arange(k.shape[0], device=k.device).minimum((count - 1).clamp(min=0))
    sequence, row = sequence[taken], row[taken]
    room = call.k_cache.shape[1] * (1 if call.block_table is None else call.block_table.shape[1])
    position = row + (cached if isinstance(cached, int) else cached[sequence])
    first, second = _places(call, sequence, position.clamp(0, room - 1))
    where = first.clamp(0, call.k_cache.shape[0] - 1), second  # without a new row a page may be any number
    for cache, values in ((call.k_cache, k), (call.v_cache, new.v)):
        cache[where] = torch.where(count > 0, values[taken], cache[where])


def _places(call: CacheCall, sequence: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices into the first two dimensions of the caches of a sequence's rows at these positions."""
    if call.block_table is not None:
        block_size = call.k_cache.shape[1]
        return call.block_table[sequence, position // block_size], position % block_size
    return sequence if call.cache_batch_idx is None else call.cache_batch_idx[sequence], position


def sequence_of_rows(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """`(total,)`: to which sequence each packed row belongs; the last one for rows past its end."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp_(max=cu_seqlens.shape[0] - 2)
