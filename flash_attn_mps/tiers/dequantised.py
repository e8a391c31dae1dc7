"""Quantised keys and values for the torch tier, which has only a few of them in float32 at a time."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator

import torch

from .. import quantised
from .layout import Group, KeyRows

_ELEMENTS = 1 << 22  # of a part: 16 MiB of float32


class Dequantised:
    """Rows `lo` to `hi` of the keys, or of the values, of a group: `(g, heads_k, hi - lo, head_dim)`, part by part.

    A slice of it is taken as that of the tensor which it stands for: `rows[:, :, lo:hi]`.
    """

    def __init__(
        self, keys: KeyRows, codes: torch.Tensor, descale: torch.Tensor | None, group: Group, lo: int, hi: int
    ) -> None:
        self.keys, self.codes, self.descale, self.group = keys, codes, descale, group
        self.lo, self.hi = lo, hi

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Dequantised:
        lo, hi, _ = index[2].indices(self.hi - self.lo)
        return Dequantised(self.keys, self.codes, self.descale, self.group, self.lo + lo, self.lo + hi)

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Where a part's rows are among these, and what they are; rows that do not exist are zero."""
        dtype, group = self.codes.dtype, self.group
        at_a_time = max(1, _ELEMENTS // max(1, group.size * self.codes.shape[-2] * self.codes.shape[-1]))
        for first in range(self.lo, self.hi, at_a_time):
            last = min(first + at_a_time, self.hi)
            codes = self.keys.rows(self.codes.view(torch.uint8), group, first, last)
            values = quantised.decoded(codes.contiguous().view(dtype))
            if self.descale is not None:
                values *= self.descale[group.seqs][:, :, None, None]
            yield slice(first - self.lo, last - self.lo), self.keys.zeroed_beyond_end(values, group, first, last)


Rows = torch.Tensor | Dequantised


def rows_of(keys: KeyRows, tensor: torch.Tensor, descale: torch.Tensor | None, group: Group, kv: slice) -> Rows:
    """The keys, or the values, of a group and of these heads."""
    tensor = tensor[..., kv, :]
    if "quantised" in keys.p.features:
        return Dequantised(keys, tensor, None if descale is None else descale[:, kv], group, 0, group.seqlen_k)
    return keys.take(tensor, group)


def products(rows: torch.Tensor, keys: Rows, less: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` times all `keys`, less a number of each row, `(..., 1)`."""
    if isinstance(keys, torch.Tensor):
        if less is None:
            return rows @ keys.transpose(-1, -2)
        one, other, minus = (t.flatten(0, 1) for t in (rows, keys, less))
        found = torch.baddbmm(minus.expand(-1, -1, keys.shape[-2]), one, other.transpose(-1, -2), beta=-1.0)
        return found.unflatten(0, rows.shape[:2])
    assert less is None  # quantised keys have no gradients
    return torch.cat([rows @ part.transpose(-1, -2) for _, part in keys.parts()], -1)


def summed(values: Rows, weighted: Callable[[slice, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The sum of what `weighted` makes of each part of the values, and of where it is among them."""
    if isinstance(values, torch.Tensor):
        return weighted(slice(None), values)
    return functools.reduce(operator.add, (weighted(at, part) for at, part in values.parts()))
