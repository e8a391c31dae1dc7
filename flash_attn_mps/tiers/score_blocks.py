"""Blocks of scores, all that a few queries have: what the `torch` tier computes at a time, forward and backward.

Shapes: in a block, `g` sequences, `h` kv heads, `r` query heads per kv head, `c` queries, `n` keys.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch

from .. import philox
from ..problem import AttentionProblem
from .dequantised import Rows, products
from .layout import Group, KeyRows, QueryRows

# What the tier honours: features of the layout in layout.py, those of scores here.
SERVES = frozenset(
    {
        "causal",
        "window",
        "attention_chunk",
        "softcap",
        "alibi",
        "dropout",
        "probabilities",
        "varlen",
        "seqused",
        "paged",
        "kv_batch_idx",
        "leftpad_k",
        "quantised",
        "mask",
        "sinks",
        "scale_tensor",
        "gradients",
        "forward_mode",
    }
)

SCORES = 1 << 22  # of a block: 16 MiB of float32
_QUERIES = 256  # of a block, if it need not have fewer: the gradients of all its keys are read and written once


class Block:
    """Queries `first` to `last` of some heads, against the keys `lo` to `hi`: all that any of them may see."""

    def __init__(
        self, p: AttentionProblem, group: Group, queries: QueryRows, keys: KeyRows, kv: slice, first: int, last: int
    ) -> None:
        self.p, self.group, self.queries, self.keys = p, group, queries, keys
        self.heads_k = kv.stop - kv.start
        together = p.heads // p.heads_k
        self.heads = slice(kv.start * together, kv.stop * together)  # heads of q
        self.first, self.last = first, last
        self.lo, self.hi = 0, group.seqlen_k
        self.left, self.right = p.window
        if group.offsets is not None:
            least, greatest = group.offsets
            if self.left >= 0:
                self.lo = max(self.lo, first + least - self.left)
            if self.right >= 0:
                self.hi = min(self.hi, last + greatest + self.right)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block's part of a tensor of queries, `(..., heads, d)`, as `(g, h, r * c, d)` in float32."""
        rows = self.queries.take(tensor[..., self.heads, :], self.group, self.first, self.last)
        g, c, _, d = rows.shape
        rows = rows.to(torch.float32).view(g, c, self.heads_k, -1, d)
        return rows.permute(0, 2, 3, 1, 4).reshape(g, self.heads_k, -1, d)

    def put(self, buffer: torch.Tensor, rows: torch.Tensor) -> None:
        """The reverse: `rows`, `(g, h, r * c, d)` or `(g, h, r, c, d)`, into that part of a buffer."""
        if rows.dim() == 4:
            rows = self.split(rows)
        rows = rows.permute(0, 3, 1, 2, 4).flatten(2, 3)
        self.queries.put(buffer[..., self.heads, :], self.group, self.first, self.last, rows)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """`(g, h, r * c, x)` to `(g, h, r, c, x)`."""
        return rows.unflatten(2, (-1, self.last - self.first))

    def scores(
        self, q_rows: torch.Tensor, k_rows: Rows, keep_capped: bool = False, lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores `(g, h, r, c, n)`, -inf where masked; less `lse`, `(g, h, r * c, 1)`, where it is given.

        With `keep_capped` also as they were before bias and mask.
        """
        p = self.p
        s = self.split(products(self.scaled(q_rows), k_rows[:, :, self.lo : self.hi], None if p.softcap else lse))
        capped = None
        if p.softcap:
            s = s.div_(p.softcap).tanh_().mul_(p.softcap)
            capped = s.clone() if keep_capped else None
            if lse is not None:
                s.sub_(self.split(lse))
        if p.alibi_slopes is not None:
            slopes = p.alibi_slopes[..., self.heads].unflatten(-1, (self.heads_k, -1))[..., None, None]
            slopes = slopes[self.group.seqs] if p.alibi_slopes.dim() == 2 else slopes
            s.sub_(slopes * self._distance().abs()[:, None, None])
        if p.mask is not None:
            mask = p.mask.expand(p.batch, p.heads, p.max_seqlen_q, p.max_seqlen_k)
            mask = mask[self.group.seqs, self.heads, self.first : self.last, self.lo : self.hi]
            mask = mask.unflatten(1, (self.heads_k, -1))
            if mask.dtype == torch.bool:
                s.masked_fill_(~mask, -torch.inf)
            else:
                s.add_(mask).masked_fill_(mask == -torch.inf, -torch.inf)  # hidden, even if the score is NaN
        self._hide_outside_of_window(s)
        hidden = self._hidden()
        return s if hidden is None else s.masked_fill_(hidden[:, None, None], -torch.inf), capped

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of queries as they enter the product with keys; gradients by that product are scaled alike."""
        return rows * self.p.softmax_scale

    def softmax(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, in the place of s, and the log-sum-exp `(g, h, r, c, 1)`. Rows of -inf give zeros."""
        m = s.amax(-1, keepdim=True)
        sinks = None if self.p.sinks is None else self.p.sinks[self.heads].view(self.heads_k, -1, 1, 1)
        if sinks is not None:
            m = torch.maximum(m, sinks)
        base = m.masked_fill(m == -torch.inf, 0.0)
        total = s.sub_(base).exp_().sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks - base).exp_()
        return s.div_(total.masked_fill(total == 0.0, 1.0)), m + total.log()

    def add_to_mask(self, dmask: torch.Tensor, ds: torch.Tensor) -> None:
        """Add the gradient of the scores, `(g, h, r, c, n)`, summed along the axes that the mask broadcasts."""
        axes = [axis for axis, n in enumerate(dmask.shape) if n == 1]
        ds = ds.flatten(1, 2)
        place = (self.group.seqs, self.heads, slice(self.first, self.last), slice(self.lo, self.hi))
        own = tuple(slice(None) if axis in axes else part for axis, part in enumerate(place))
        dmask[own] += ds.sum(axes, keepdim=True) if axes else ds

    def kept(self) -> torch.Tensor:
        """`(g, h, r, c, n)`, bool: which scores dropout keeps."""
        p = self.p
        seqs = torch.arange(p.batch, device=p.q.device)[self.group.seqs]
        heads = seqs[:, None] * p.heads + torch.arange(self.heads.start, self.heads.stop, device=p.q.device)
        keep = philox.keep(int(p.seed), p.dropout_p, heads, (self.first, self.last), (self.lo, self.hi))
        return keep.unflatten(1, (self.heads_k, -1))

    def rounding(self, q_rows: torch.Tensor, k_seen: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """`(g, h, r, c, 1)`: how far apart the log-sum-exp of these rows, here `lse`, may be elsewhere.

        The rounding of a sum of products in float32 is relative to the sum of their magnitudes, at most |q| |k|.
        """
        largest = q_rows.norm(dim=-1, keepdim=True) * k_seen.norm(dim=-1).amax(-1)[..., None, None]
        scale: Any = self.p.softmax_scale  # a number or a 0-d tensor
        largest = self.split(largest) * abs(scale)
        if self.p.softcap:
            largest = largest.clamp(max=self.p.softcap)
        return 8 * torch.finfo(torch.float32).eps * (largest + lse.abs())

    def _keys(self) -> torch.Tensor:
        """`(n,)`: j."""
        return torch.arange(self.lo, self.hi, device=self.p.q.device)

    def _diagonal(self) -> torch.Tensor:
        """`(g or 1, c, 1)`: i + offset, the key that a query is aligned with."""
        i = torch.arange(self.first, self.last, device=self.p.q.device)[None, :, None]
        group, seqlens_k, seqlens_q = self.group, self.keys.lengths, self.queries.lengths
        if seqlens_k is None and seqlens_q is None:
            return i + (group.seqlen_k - group.seqlen_q)
        seqlen_k = group.seqlen_k if seqlens_k is None else seqlens_k[group.seqs][:, None, None]
        seqlen_q = group.seqlen_q if seqlens_q is None else seqlens_q[group.seqs][:, None, None]
        return i + (seqlen_k - seqlen_q)

    def _distance(self, part: slice = slice(None)) -> torch.Tensor:
        """`(g or 1, c, n)`: of a key, or of those of `part`, from the query's diagonal."""
        return self._keys()[part] - self._diagonal()

    def _hide_outside_of_window(self, s: torch.Tensor) -> None:
        """Only at the edges, where the host knows them: between them all queries see all keys."""
        left, right, offsets = self.left, self.right, self.group.offsets
        if right >= 0:
            edge = self.lo if offsets is None else self.first + offsets[0] + right + 1
            part = slice(max(0, edge - self.lo), None)
            s[..., part].masked_fill_((self._distance(part) > right)[:, None, None], -torch.inf)
        if left >= 0:
            edge = self.hi if offsets is None else self.last - 1 + offsets[1] - left
            part = slice(0, max(0, edge - self.lo))
            s[..., part].masked_fill_((self._distance(part) < -left)[:, None, None], -torch.inf)

    def _hidden(self) -> torch.Tensor | None:
        """`(g or 1, c, n)`: which scores do not count for another reason than the window; None if all do."""
        hidden: list[torch.Tensor] = []
        if self.p.attention_chunk:
            chunks = self._diagonal().div(self.p.attention_chunk, rounding_mode="floor")
            hidden.append(self._keys() // self.p.attention_chunk != chunks)
        if (valid := self.keys.valid(self.group)) is not None:
            hidden.append(~valid[:, None, self.lo : self.hi])
        if (valid := self.queries.valid(self.group, self.first, self.last)) is not None:
            hidden.append(~valid[:, :, None])
        return functools.reduce(operator.or_, hidden) if hidden else None


def kv_heads(p: AttentionProblem, group: Group) -> Iterator[slice]:
    """The heads of k, as many at a time as leave enough queries to their blocks."""
    count = max(1, min(p.heads_k, SCORES // (_scores_of_a_query(p, group) * min(_QUERIES, group.seqlen_q))))
    for first in range(0, p.heads_k, count):
        yield slice(first, min(first + count, p.heads_k))


def blocks(p: AttentionProblem, group: Group, queries: QueryRows, keys: KeyRows, kv: slice) -> Iterator[Block]:
    count = max(1, SCORES // (_scores_of_a_query(p, group) * (kv.stop - kv.start)))
    for first in range(0, group.seqlen_q, count):
        block = Block(p, group, queries, keys, kv, first, min(first + count, group.seqlen_q))
        if block.lo < block.hi:
            yield block


def _scores_of_a_query(p: AttentionProblem, group: Group) -> int:
    """Of one head of k."""
    return max(1, group.size * (p.heads // p.heads_k) * group.seqlen_k)
