"""The `torch` tier: exact attention in plain PyTorch, on any device, in memory proportional to the length.

Queries are taken in blocks small enough that a block's scores against all the keys it can see stay within `_SCORES`.
All arithmetic is in float32. The backward pass recomputes the scores, as in FlashAttention (Dao et al., 2022,
https://arxiv.org/abs/2205.14135, algorithm 4), from the log-sum-exp, which may be that of more keys than there are
here. Under a mask it normalises them anew: a log-sum-exp of -3e38, of a row whose every key has the least finite number
added, holds no trace of the sum.

Symbols as in the papers: s scores, p probabilities, o output, ds and dp their gradients. In a block, `g` sequences, `r`
query heads per kv head, `c` queries, `n` keys.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator

import torch

from ..checks import readable
from ..problem import AttentionProblem, Result
from .layout import Group, KeyRows, QueryRows, groups
from .tier import LSE_GRADIENT, Gradients, Tier

_SCORES = 1 << 22  # 16 MiB of float32
_FEATURES = frozenset(
    {
        "causal",
        "window",
        "attention_chunk",
        "softcap",
        "alibi",
        "dropout",
        "varlen",
        "seqused",
        "paged",
        "kv_batch_idx",
        "leftpad_k",
        "mask",
        "sinks",
        "scale_tensor",
        "gradients",
    }
)


def _limits(p: AttentionProblem) -> list[str]:
    return []


def run(p: AttentionProblem) -> Result:
    """Output, log-sum-exp (always) and probabilities."""
    p = p.resolved()
    q, k, v = p.q, p.k, p.v
    probs = None
    if p.want_probs:
        probs = torch.zeros((p.batch, p.heads, p.max_seqlen_q, p.max_seqlen_k), dtype=q.dtype, device=q.device)
    if q.is_meta:
        return Result(q.new_empty(p.out_shape), q.new_empty(p.lse_shape, dtype=torch.float32), probs)
    queries, keys = QueryRows(p), KeyRows(p)
    out = queries.new(q, (p.heads, v.shape[-1]), 0.0, q.dtype)
    lse = queries.new(q, (p.heads,), -torch.inf, torch.float32)
    if p.sinks is not None:  # what a query has that sees no key
        lse.copy_(p.sinks)
    dropout = _Dropout(p)
    for group in () if p.empty else groups(p):
        k_rows, v_rows = keys.take(k, group), keys.take(v, group)
        for block in _blocks(p, group, queries, keys):
            s, _ = block.scores(block.heads_first(queries.take(q, group, block.first, block.last)), k_rows)
            v_seen = v_rows[:, :, block.lo : block.hi]
            seen = s != -torch.inf if _may_spread(p, v_seen) else None
            prob, block_lse = block.softmax(s)
            if probs is not None:
                probs[group.seqs, :, block.first : block.last, block.lo : block.hi] = prob.flatten(1, 2).to(q.dtype)
            if p.dropout_p:
                keep = dropout.keep(prob)
                if probs is not None:
                    signs = keep.flatten(1, 2) * 2.0 - 1.0
                    probs[group.seqs, :, block.first : block.last, block.lo : block.hi] *= signs.to(q.dtype)
                prob *= keep / (1.0 - p.dropout_p)
            o = _weighted(prob.flatten(2, 3), v_seen, seen)
            queries.put(out, group, block.first, block.last, block.rows_first(o))
            queries.put(lse, group, block.first, block.last, block.rows_first(block_lse)[..., 0])
    lse = queries.finished(lse)
    if p.sinks is not None and (exists := queries.exist()) is not None:
        lse.masked_fill_(~exists[..., None], -torch.inf)
    return Result(queries.finished(out), lse.transpose(-1, -2).contiguous(), probs)


def backward(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> Gradients:
    """Gradients of q, k, v and sinks, in their dtypes. `dlse` is the gradient of the log-sum-exp, if it has one."""
    p = p.resolved()
    q, k, v = p.q, p.k, p.v
    if q.is_meta:
        dsinks = None if p.sinks is None else torch.empty_like(p.sinks)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks
    queries, keys = QueryRows(p), KeyRows(p)
    dq = queries.new(q, q.shape[-2:], 0.0, q.dtype)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    lse, dlse = lse.transpose(-1, -2), None if dlse is None else dlse.transpose(-1, -2)
    dsinks = None if p.sinks is None else _gradient_of_sinks(p.sinks, out, lse, dout, dlse)
    dropout = _Dropout(p)
    for group in () if p.empty else groups(p):
        k_rows, v_rows = keys.take(k, group), keys.take(v, group)
        dk_rows, dv_rows = torch.zeros_like(k_rows), torch.zeros_like(v_rows)
        for block in _blocks(p, group, queries, keys):

            def rows(tensor: torch.Tensor, block: _Block = block, group: Group = group) -> torch.Tensor:
                return block.heads_first(queries.take(tensor, group, block.first, block.last))

            k_seen, v_seen = k_rows[:, :, block.lo : block.hi], v_rows[:, :, block.lo : block.hi]
            q_rows, do = rows(q), rows(dout)
            delta = (do * rows(out)).sum(-1, keepdim=True)
            if dlse is not None:
                delta -= rows(dlse[..., None])
            s, capped = block.scores(q_rows, k_rows, keep_capped=True)
            hidden = s == -torch.inf if _may_spread(p, q_rows, k_seen, v_seen) else None
            if p.mask is None:
                block_lse = rows(lse[..., None])
                # Against +inf the probabilities of a row that sees nothing are 0, not NaN.
                prob = s.sub_(block.split(block_lse.masked_fill(block_lse == -torch.inf, torch.inf))).exp_()
            else:
                prob, _ = block.softmax(s)
            if hidden is not None:
                prob.masked_fill_(hidden, 0.0)
                k_seen, v_seen = _finite(k_seen), _finite(v_seen)
            dp = block.split(do @ v_seen.transpose(-1, -2))
            kept = prob
            if p.dropout_p:
                keep = dropout.keep(prob).to(torch.float32).div_(1.0 - p.dropout_p)
                kept, dp = prob * keep, dp.mul_(keep)
            dv_rows[:, :, block.lo : block.hi] += kept.flatten(2, 3).transpose(-1, -2) @ do
            ds = dp.sub_(block.split(delta)).mul_(prob)
            if hidden is not None:
                ds.masked_fill_(hidden, 0.0)
            if capped is not None:
                ds.mul_(1.0 - capped.div_(p.softcap).square_())
            ds = ds.flatten(2, 3)
            queries.put(
                dq, group, block.first, block.last, block.rows_first(block.split(ds @ k_seen * p.softmax_scale))
            )
            dk_rows[:, :, block.lo : block.hi] += ds.transpose(-1, -2) @ (q_rows * p.softmax_scale)
        keys.add(dk, group, dk_rows)
        keys.add(dv, group, dv_rows)
    return queries.finished(dq), dk.to(k.dtype), dv.to(v.dtype), dsinks


def _gradient_of_sinks(
    sinks: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> torch.Tensor:
    """`(heads,)`. A sink's probability takes from the output, whose own value it weighs with zero:
    ds = p (0 - do o) + p dlse, of every query. lse and dlse are rows first.
    """
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta -= dlse
    # A row that does not exist, or whose sink is -inf and that sees nothing, has lse -inf: p is 0 then, not NaN.
    prob = (sinks - lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()
    return -(prob * delta).masked_fill_(prob == 0.0, 0.0).flatten(0, -2).sum(0)


def _may_spread(p: AttentionProblem, *rows: torch.Tensor) -> bool:
    """May what is hidden from some queries be NaN or infinite, so that 0 times it would spread?

    What keeps them back is one product more. Where looking would wait for the device it is spent on masks alone:
    they hide what was never written, windows only hide what others see.
    """
    if p.mask is None and p.window == (-1, -1) and not p.attention_chunk:
        return False
    if not all(map(readable, rows)):
        return p.mask is not None
    return not all(bool(t.isfinite().all()) for t in rows)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    return rows.nan_to_num(0.0, 0.0, 0.0)


def _weighted(prob: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """p v. With `seen`, a value that is not finite counts for the queries that see its key, and makes them NaN."""
    if seen is None:
        return prob @ v
    spoilt = seen.flatten(2, 3).to(torch.float32) @ (~v.isfinite()).to(torch.float32)
    return (prob @ _finite(v)).masked_fill_(spoilt > 0.0, torch.nan)


class _Dropout:
    """What dropout keeps, block by block, the same in forward and backward: both take the blocks in the same order."""

    def __init__(self, p: AttentionProblem) -> None:
        self.p = p.dropout_p
        self.generator = torch.Generator(p.q.device).manual_seed(int(p.seed)) if p.dropout_p else None

    def keep(self, prob: torch.Tensor) -> torch.Tensor:
        return torch.rand(prob.shape, generator=self.generator, dtype=torch.float32, device=prob.device) >= self.p


class _Block:
    """Queries `first` to `last` of a group against the keys `lo` to `hi`, all that any of them may see."""

    def __init__(self, p: AttentionProblem, group: Group, queries: QueryRows, keys: KeyRows, first: int, last: int):
        self.p, self.group, self.queries, self.keys = p, group, queries, keys
        self.first, self.last = first, last
        self.lo, self.hi = 0, group.seqlen_k
        self.left, self.right = p.window
        if group.offsets is not None:
            least, greatest = group.offsets
            if self.left >= 0:
                self.lo = max(self.lo, first + least - self.left)
            if self.right >= 0:
                self.hi = min(self.hi, last + greatest + self.right)

    def heads_first(self, rows: torch.Tensor) -> torch.Tensor:
        """`(g, c, heads, d)` to `(g, heads_k, r * c, d)`, float32."""
        g, c, heads, d = rows.shape
        heads_k = self.p.heads_k
        rows = rows.to(torch.float32).view(g, c, heads_k, heads // heads_k, d)
        return rows.permute(0, 2, 3, 1, 4).reshape(g, heads_k, -1, d)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """`(g, heads_k, r * c, x)` to `(g, heads_k, r, c, x)`."""
        return rows.unflatten(2, (-1, self.last - self.first))

    def rows_first(self, rows: torch.Tensor) -> torch.Tensor:
        """`(g, heads_k, r, c, d)` or `(g, heads_k, r * c, d)` to `(g, c, heads, d)`."""
        if rows.dim() == 4:
            rows = self.split(rows)
        return rows.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def scores(
        self, q_rows: torch.Tensor, k_rows: torch.Tensor, keep_capped: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores `(g, heads_k, r, c, n)`, -inf where masked.

        With `keep_capped` also as they were before bias and mask.
        """
        p = self.p
        s = self.split((q_rows * p.softmax_scale) @ k_rows[:, :, self.lo : self.hi].transpose(-1, -2))
        capped = None
        if p.softcap:
            s = s.div_(p.softcap).tanh_().mul_(p.softcap)
            capped = s.clone() if keep_capped else None
        distance = None
        if p.alibi_slopes is not None or self.left >= 0 or self.right >= 0:
            distance = self._keys() - self._diagonal()  # (g or 1, c, n): of a key from the query's diagonal
        if p.alibi_slopes is not None and distance is not None:
            slopes = p.alibi_slopes.unflatten(-1, (p.heads_k, -1))[..., None, None]
            slopes = slopes[self.group.seqs] if p.alibi_slopes.dim() == 2 else slopes
            s.sub_(slopes * distance.abs()[:, None, None])
        if p.mask is not None:
            mask = p.mask[self.group.seqs, :, self.first : self.last, self.lo : self.hi].unflatten(1, (p.heads_k, -1))
            if mask.dtype == torch.bool:
                s.masked_fill_(~mask, -torch.inf)
            else:
                s.add_(mask).masked_fill_(mask == -torch.inf, -torch.inf)  # hidden, even if the score is NaN
        hidden = self._hidden(distance)
        return s if hidden is None else s.masked_fill_(hidden[:, None, None], -torch.inf), capped

    def softmax(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, in the place of s, and the log-sum-exp `(g, heads_k, r, c, 1)`. Rows of -inf give zeros."""
        m = s.amax(-1, keepdim=True)
        sinks = None if self.p.sinks is None else self.p.sinks.view(self.p.heads_k, -1, 1, 1)
        if sinks is not None:
            m = torch.maximum(m, sinks)
        base = m.masked_fill(m == -torch.inf, 0.0)
        total = s.sub_(base).exp_().sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks - base).exp_()
        return s.div_(total.masked_fill(total == 0.0, 1.0)), m + total.log()

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

    def _hidden(self, distance: torch.Tensor | None) -> torch.Tensor | None:
        """`(g or 1, c, n)`: which scores do not count; None if all do."""
        hidden: list[torch.Tensor] = []
        if distance is not None and self.right >= 0:
            hidden.append(distance > self.right)
        if distance is not None and self.left >= 0:
            hidden.append(distance < -self.left)
        if self.p.attention_chunk:
            chunks = self._diagonal().div(self.p.attention_chunk, rounding_mode="floor")
            hidden.append(self._keys() // self.p.attention_chunk != chunks)
        if (valid := self.keys.valid(self.group)) is not None:
            hidden.append(~valid[:, None, self.lo : self.hi])
        if (valid := self.queries.valid(self.group, self.first, self.last)) is not None:
            hidden.append(~valid[:, :, None])
        return functools.reduce(operator.or_, hidden) if hidden else None


def _blocks(p: AttentionProblem, group: Group, queries: QueryRows, keys: KeyRows) -> Iterator[_Block]:
    count = max(1, _SCORES // max(1, group.size * p.heads * group.seqlen_k))
    for first in range(0, group.seqlen_q, count):
        block = _Block(p, group, queries, keys, first, min(first + count, group.seqlen_q))
        if block.lo < block.hi:
            yield block


TIER = Tier("torch", _FEATURES, _limits, run, _FEATURES | {LSE_GRADIENT}, backward)
