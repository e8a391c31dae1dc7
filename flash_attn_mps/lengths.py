"""The lengths of a packed batch's sequences: checked, as far as the host can without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import checks


class Lengths(NamedTuple):
    """How long the queries are, or the keys."""

    max_seqlen: int
    max_seqlen_tensor: torch.Tensor | None = None  # 0-d: where only the device knows it; max_seqlen is then a bound
    lengths: list[int] | None = None  # of each sequence, where the host can read them for free


class Rows(NamedTuple):
    """A number of rows of each sequence."""

    number: int | torch.Tensor  # one for all, or (batch,) int32 on the device
    known: list[int] | None  # that of each sequence, where the host can read it for free

    def each(self, change: Callable[[Any, Any], Any], other: Rows) -> Rows:
        """`change` of the rows of each sequence by those of another kind."""
        known = None
        if self.known is not None and other.known is not None:
            known = [change(n, m) for n, m in zip(self.known, other.known, strict=True)]
        return Rows(change(self.number, other.number), known)


def packed_lengths(
    tensors: tuple[torch.Tensor, torch.Tensor],
    cu_seqlens: tuple[Any, Any],
    max_seqlens: tuple[Any, Any],
    seqused: tuple[Any, Any],
    block_table: Any,
    names: Mapping[str, str] = checks.NO_NAMES,
) -> tuple[Lengths, Lengths]:
    """The lengths of packed queries and those of their keys. Each argument is a pair: of the queries, of the keys.

    With `block_table`, which is checked too, the keys are pages.
    """
    (q, k), (cu_seqlens_q, cu_seqlens_k) = tensors, cu_seqlens
    (max_seqlen_q, max_seqlen_k), (seqused_q, seqused_k) = max_seqlens, seqused
    name, paged = names.get, block_table is not None
    cu_q_name, cu_k_name = name("cu_seqlens_q", "cu_seqlens_q"), name("cu_seqlens_k", "cu_seqlens_k")
    total_q, room = q.shape[0], k.shape[0]
    known_q = known_k = checks.cu_seqlens(cu_seqlens_q, cu_q_name, total_q, name("q", "q"), q)
    batch = cu_seqlens_q.shape[0] - 1
    block_table_name = name("block_table", "block_table")
    if paged:
        checks.int32(block_table, block_table_name, "batch of cu_seqlens_q, blocks per sequence", batch, q)
        room = block_table.shape[1] * k.shape[1]
    same = cu_seqlens_k is cu_seqlens_q and not paged and room == total_q
    if not same:
        known_k = checks.cu_seqlens(cu_seqlens_k, cu_k_name, None if paged else room, name("k", "k"), q)
        if cu_seqlens_k.shape[0] != batch + 1:
            raise checks.malformed(cu_k_name, cu_seqlens_k, f"{batch + 1} values, as many as {cu_q_name}")
    if paged:
        check_pages(block_table, k, known_k, cu_k_name, block_table_name)
    longest, tensor = checks.max_seqlen(max_seqlen_q, name("max_seqlen_q", "max_seqlen_q"), known_q, total_q)
    queries = keys = Lengths(longest, tensor, known_q)
    if not same or max_seqlen_k is not max_seqlen_q:
        longest, tensor = checks.max_seqlen(max_seqlen_k, name("max_seqlen_k", "max_seqlen_k"), known_k, room)
        keys = Lengths(longest, tensor, known_k)
    if seqused_q is not None:
        queries = used(queries, seqused_q, name("seqused_q", "seqused_q"), batch, q, cu_q_name)
    if seqused_k is not None:
        keys = used(keys, seqused_k, name("seqused_k", "seqused_k"), batch, q, cu_k_name)
    return queries, keys


def used(side: Lengths, seqused: Any, name: str, batch: int, like: torch.Tensor, room_of: str) -> Lengths:
    """`side` with only the first `seqused` rows of each sequence in use."""
    known = checks.lengths(seqused, name, batch, side.lengths or side.max_seqlen, like, room_of)
    return Lengths(side.max_seqlen, side.max_seqlen_tensor, known)


def check_pages(
    block_table: torch.Tensor,
    k: torch.Tensor,
    lengths: list[int] | None,
    lengths_name: str,
    name: str = "block_table",
    first: list[int] | None = None,
) -> None:
    """Check `block_table` `(batch, blocks per sequence)` against the pages of k and the lengths that it must hold.

    `first` is the row at which each sequence starts, 0 by default: nothing before it is looked at.
    """
    num_blocks, block_size = k.shape[:2]
    if lengths is None or not checks.readable(block_table):
        return
    room = block_table.shape[1] * block_size
    if lengths and max(lengths) > room:
        raise checks.malformed(
            lengths_name, f"a sequence of {max(lengths)} keys", f"at most {room}, the room of {name}"
        )
    # Only blocks that hold keys are looked at.
    begin = torch.tensor(first or [0] * len(lengths), device="cpu")[:, None]
    end = torch.tensor(lengths, device="cpu")[:, None]
    row = torch.arange(block_table.shape[1], device="cpu") * block_size
    holds_keys = (begin < end) & (row < end) & (begin < row + block_size)
    checks.indices(block_table, name, num_blocks, "the blocks of k", holds_keys)
