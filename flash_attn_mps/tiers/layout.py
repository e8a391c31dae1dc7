"""Rows of any layout as padded blocks `(sequences, n, heads, head_dim)`, for the torch tier.

Lengths and indices stay on the device; nothing waits for it. Rows past the end of a sequence are read from some valid
row and masked, and never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..problem import AttentionProblem

_LEAST_ROWS = 4096  # padding up to here is cheaper than another group


@dataclass(slots=True)
class Group:
    """Sequences that are computed together, padded to the longest of them."""

    seqs: slice | torch.Tensor
    size: int
    seqlen_q: int
    seqlen_k: int
    offsets: tuple[int, int] | None  # the least and the greatest seqlen_k - seqlen_q; None where the host cannot know


def groups(p: AttentionProblem) -> Iterator[Group]:
    """Split the batch into groups whose padding stays proportional to the number of real rows."""
    if not p.ragged_q and not p.ragged_k:
        offset = p.max_seqlen_k - p.max_seqlen_q
        yield Group(slice(0, p.batch), p.batch, p.max_seqlen_q, p.max_seqlen_k, (offset, offset))
    elif (lengths := _known_lengths(p)) is not None:
        yield from _groups_of_like_length(lengths, p.q.device)
    else:
        same = p.cu_seqlens_k is not None and p.cu_seqlens_k is p.cu_seqlens_q and p.seqused_q is p.seqused_k
        padded = p.max_seqlen_q + p.max_seqlen_k
        size = max(1, max(_LEAST_ROWS, p.q.shape[0] + p.k.shape[0]) // padded)
        for first in range(0, p.batch, size):
            last = min(first + size, p.batch)
            yield Group(slice(first, last), last - first, p.max_seqlen_q, p.max_seqlen_k, (0, 0) if same else None)


def _known_lengths(p: AttentionProblem) -> list[tuple[int, int]] | None:
    lengths_q = p.lengths_q if p.ragged_q else [p.max_seqlen_q] * p.batch
    lengths_k = p.lengths_k if p.ragged_k else [p.max_seqlen_k] * p.batch
    if lengths_q is None or lengths_k is None:
        return None
    return list(zip(lengths_q, lengths_k, strict=True))


def _groups_of_like_length(lengths: list[tuple[int, int]], device: torch.device) -> Iterator[Group]:
    order = sorted((n for n, (q, k) in enumerate(lengths) if q and k), key=lambda n: (lengths[n][1], lengths[n][0]))
    members: list[int] = []
    rows = longest_q = longest_k = 0
    for n in [*order, None]:
        if n is not None:
            q, k = lengths[n]
            padded = (len(members) + 1) * (max(longest_q, q) + max(longest_k, k))
            if not members or padded <= 1.25 * (rows + q + k) + 256:
                members.append(n)
                rows, longest_q, longest_k = rows + q + k, max(longest_q, q), max(longest_k, k)
                continue
        if members:
            offsets = [lengths[m][1] - lengths[m][0] for m in members]
            seqs = torch.tensor(members, device=device)
            yield Group(seqs, len(members), longest_q, longest_k, (min(offsets), max(offsets)))
        if n is not None:
            members, (longest_q, longest_k) = [n], lengths[n]
            rows = longest_q + longest_k


def _lengths(cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None) -> torch.Tensor | None:
    if seqused is not None:
        return seqused
    return None if cu_seqlens is None else cu_seqlens.diff()


class QueryRows:
    """The layout of q, out, lse and their gradients: dense, or packed by `cu_seqlens_q`."""

    def __init__(self, p: AttentionProblem) -> None:
        self.starts = p.cu_seqlens_q
        self.lengths = _lengths(p.cu_seqlens_q, p.seqused_q)
        self.total, self.rows = p.q.shape[:2]  # packed: all rows; dense: those of a sequence

    def new(self, like: torch.Tensor, tail: tuple[int, ...], fill: float, dtype: torch.dtype) -> torch.Tensor:
        """A buffer with the rows of q. A packed one has an extra row at its end, for values to be discarded."""
        lead = like.shape[:2] if self.starts is None else (self.total + 1,)
        return torch.full((*lead, *tail), fill, dtype=dtype, device=like.device)

    def finished(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer if self.starts is None else buffer[: self.total]

    def take(self, tensor: torch.Tensor, group: Group, first: int, last: int) -> torch.Tensor:
        """`(sequences, rows, ...)`; rows that do not exist are zero."""
        if self.starts is None:
            return tensor[group.seqs, first:last]
        index, valid = self._index(group, first, last)
        valid = valid.view(*valid.shape, *[1] * (tensor.dim() - 1))
        return tensor[index.clamp_(max=self.total - 1)].masked_fill_(~valid, 0.0)

    def put(self, buffer: torch.Tensor, group: Group, first: int, last: int, values: torch.Tensor) -> None:
        if self.starts is None:
            buffer[group.seqs, first:last] = values.to(buffer.dtype)
        else:
            index, valid = self._index(group, first, last)
            buffer[index.masked_fill_(~valid, self.total)] = values.to(buffer.dtype)

    def valid(self, group: Group, first: int, last: int) -> torch.Tensor | None:
        """`(sequences, rows)`: which rows exist; None if all do."""
        if self.lengths is None:
            return None
        rows = torch.arange(first, last, device=self.lengths.device)
        return rows < self.lengths[group.seqs][:, None]

    def exist(self) -> torch.Tensor | None:
        """Which rows of q are queries of some sequence, `q.shape[:-2]`; None if all are."""
        if self.lengths is None:
            return None
        device = self.lengths.device
        if self.starts is None:
            return torch.arange(self.rows, device=device) < self.lengths[:, None]
        rows = torch.arange(self.total, device=device, dtype=self.starts.dtype)
        if not self.lengths.shape[0]:
            return torch.zeros_like(rows, dtype=torch.bool)
        seqs = (torch.searchsorted(self.starts.contiguous(), rows, right=True) - 1).clamp_(
            max=self.lengths.shape[0] - 1
        )
        return rows < (self.starts[:-1] + self.lengths)[seqs]

    def _index(self, group: Group, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of packed queries, `(sequences, rows)`, and which of them exist."""
        assert self.starts is not None and self.lengths is not None
        rows = torch.arange(first, last, device=self.starts.device)
        return self.starts[:-1][group.seqs][:, None] + rows, rows < self.lengths[group.seqs][:, None]


class KeyRows:
    """The layout of k, v and their gradients: dense, packed, paged, picked by `kv_batch_idx` or shifted by leftpad."""

    def __init__(self, p: AttentionProblem) -> None:
        self.p = p
        self.lengths = _lengths(p.cu_seqlens_k, p.seqused_k)

    def take(self, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        """`(sequences, heads_k, seqlen_k, head_dim)` in float32, contiguous; rows that do not exist are zero."""
        rows = self.rows(tensor, group, 0, group.seqlen_k)
        rows = torch.empty(rows.shape, dtype=torch.float32, device=rows.device).copy_(rows)
        return self.zeroed_beyond_end(rows, group, 0, group.seqlen_k)

    def rows(self, tensor: torch.Tensor, group: Group, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last`, `(sequences, heads_k, last - first, head_dim)`; any values where there is none."""
        return tensor[self._slices(group, first, last) or self._indices(group, first, last)].transpose(1, 2)

    def zeroed_beyond_end(self, rows: torch.Tensor, group: Group, first: int, last: int) -> torch.Tensor:
        """Because memory past the end may hold NaN, and 0 * NaN is NaN."""
        valid = self.valid(group)
        return rows if valid is None else rows.masked_fill(~valid[:, None, first:last, None], 0.0)

    def zeros_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where gradients are added up: in the tensor's dtype if each row is added to once, without an index."""
        p = self.p
        once = not (p.ragged_q or p.ragged_k) and p.block_table is None and p.kv_batch_idx is None
        return torch.zeros(tensor.shape, dtype=tensor.dtype if once else torch.float32, device=tensor.device)

    def add(self, buffer: torch.Tensor, group: Group, values: torch.Tensor) -> None:
        """Add the gradients of a group, laid out as `take` gives rows; they are zero for rows that do not exist."""
        slices = self._slices(group, 0, group.seqlen_k)
        if slices is not None:
            buffer[slices] += values.transpose(1, 2)
        else:
            buffer.index_put_(self._indices(group, 0, group.seqlen_k), values.transpose(1, 2), accumulate=True)

    def valid(self, group: Group) -> torch.Tensor | None:
        """`(sequences, seqlen_k)`: which keys exist; None if all do."""
        if self.lengths is None:
            return None
        rows = torch.arange(group.seqlen_k, device=self.lengths.device)
        return rows < self.lengths[group.seqs][:, None]

    def _slices(self, group: Group, first: int, last: int) -> tuple[slice, slice] | None:
        """Sequences and rows of a dense k whose sequences are computed in order; else None."""
        p = self.p
        plain = p.cu_seqlens_k is None and p.block_table is None and p.kv_batch_idx is None and p.leftpad_k is None
        return (group.seqs, slice(first, last)) if plain and isinstance(group.seqs, slice) else None

    def _indices(self, group: Group, first: int, last: int) -> tuple[torch.Tensor, ...]:
        p, seqs, n = self.p, group.seqs, last - first
        rows = torch.arange(first, last, device=p.q.device)
        if p.block_table is not None:
            num_blocks, block_size = p.k.shape[:2]
            table = p.block_table[seqs if p.kv_batch_idx is None else p.kv_batch_idx[seqs]]
            if p.leftpad_k is not None:
                rows = p.leftpad_k[seqs][:, None] + rows
            columns = (rows // block_size).clamp_(max=table.shape[1] - 1).expand(table.shape[0], n)
            # Entries past a sequence's last block may hold anything: clamp them to some block; its rows are masked.
            return table.gather(1, columns.long()).clamp_(0, num_blocks - 1), rows % block_size
        if p.cu_seqlens_k is not None:
            return ((p.cu_seqlens_k[:-1][seqs][:, None] + rows).clamp_(max=p.k.shape[0] - 1),)
        entries = torch.arange(p.batch, device=p.q.device) if p.kv_batch_idx is None else p.kv_batch_idx
        if p.leftpad_k is not None:
            rows = (p.leftpad_k[seqs][:, None] + rows).clamp_(max=p.k.shape[1] - 1)
        return entries[seqs][:, None], rows
