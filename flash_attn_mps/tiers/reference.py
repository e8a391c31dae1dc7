"""The `torch` tier: exact attention in plain PyTorch, on any device, in memory proportional to the length.

Queries are taken in blocks small enough that a block's scores against all the keys it can see stay within `SCORES`.
All arithmetic is in float32. The backward pass recomputes the probabilities from the log-sum-exp, as in FlashAttention
(Dao et al., 2022, https://arxiv.org/abs/2205.14135, algorithm 4): five products and three other passes over the scores.

Where a log-sum-exp is large, its rounding and that of the scores, which those who gave it may have rounded otherwise,
would show. The probabilities are then normalised by the scores that are here, and the log-sum-exp only says what share
of the whole probability falls to them. Under a mask that is all of it: a log-sum-exp of -3e38, of a row whose every key
has the least finite number added, would hold no trace of the sum.

Symbols as in the papers: s scores, p probabilities, o output, ds and dp their gradients. In a block, `g` sequences, `h`
kv heads, `r` query heads per kv head, `c` queries, `n` keys.
"""

from __future__ import annotations

import torch

from ..checks import readable
from ..problem import AttentionProblem, Result
from .dequantised import Rows, products, rows_of, summed
from .layout import KeyRows, QueryRows, groups
from .score_blocks import SERVES, blocks, kv_heads
from .tier import LARGE_LSE, LSE_GRADIENT, MASK_GRADIENT, Gradients, Tier


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
    for group in () if p.empty else groups(p):
        for kv in kv_heads(p, group):
            k_rows, v_rows = rows_of(keys, k, p.k_descale, group, kv), rows_of(keys, v, p.v_descale, group, kv)
            for block in blocks(p, group, queries, keys, kv):
                s, _ = block.scores(block.rows(q), k_rows)
                v_seen = v_rows[:, :, block.lo : block.hi]
                seen = s != -torch.inf if _may_hold_nonfinite(p, False, v_seen) else None
                prob, block_lse = block.softmax(s)
                place = (group.seqs, block.heads, slice(block.first, block.last), slice(block.lo, block.hi))
                if probs is not None:
                    probs[place] = prob.flatten(1, 2).to(q.dtype)
                if p.dropout_p:
                    keep = block.kept()
                    if probs is not None:
                        signs = keep.flatten(1, 2) * 2.0 - 1.0
                        probs[place] *= signs.to(q.dtype)
                    prob *= keep / (1.0 - p.dropout_p)
                o = _weighted(prob.flatten(2, 3), v_seen, seen)
                block.put(out, o)
                block.put(lse[..., None], block_lse)
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
    needed: frozenset[str],
) -> Gradients:
    """Gradients of the tensors that `needed` names. `dlse` is the gradient of the log-sum-exp, if it has one."""
    p = p.resolved()
    q, k, v = p.q, p.k, p.v
    if q.is_meta:
        return Gradients(**{f"d{name}": torch.empty_like(getattr(p, name)) for name in needed})
    queries, keys = QueryRows(p), KeyRows(p)
    of_scores = not needed.isdisjoint({"q", "k", "mask"})  # is the gradient of the scores needed?
    dq = queries.new(q, q.shape[-2:], 0.0, q.dtype) if "q" in needed else None
    dk, dv = (keys.zeros_like(x) if name in needed else None for name, x in (("k", k), ("v", v)))
    dmask = _zeros_for(p, p.mask) if "mask" in needed and p.mask is not None else None
    lse, dlse = lse.transpose(-1, -2), None if dlse is None else dlse.transpose(-1, -2)
    # Against +inf the probability of a row that sees nothing is 0, not NaN.
    less = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None] if _is_small(lse, q.dtype) else None
    dsinks = None if p.sinks is None or "sinks" not in needed else _gradient_of_sinks(p.sinks, out, lse, dout, dlse)
    for group in groups(p) if (of_scores or dv is not None) and not p.empty else ():
        for kv in kv_heads(p, group):
            k_rows, v_rows = keys.take(k[..., kv, :], group), keys.take(v[..., kv, :], group)
            dk_rows, dv_rows = torch.zeros_like(k_rows), torch.zeros_like(v_rows)
            for block in blocks(p, group, queries, keys, kv):
                seen = slice(block.lo, block.hi)
                k_seen, v_seen = k_rows[:, :, seen], v_rows[:, :, seen]
                q_rows, do = block.rows(q), block.rows(dout)
                s, capped = block.scores(q_rows, k_rows, of_scores, None if less is None else block.rows(less))
                hidden = s == -torch.inf if _may_hold_nonfinite(p, p.ragged_q, q_rows, k_seen, v_seen) else None
                if hidden is not None:
                    k_seen, v_seen = _finite(k_seen), _finite(v_seen)
                if less is not None:
                    prob = s.exp_()
                else:
                    prob, own_lse = block.softmax(s)
                    if p.mask is None:
                        rounding = block.rounding(q_rows, k_seen, own_lse)
                        prob *= _share(block.split(block.rows(lse[..., None])), own_lse, rounding)
                if hidden is not None:
                    prob.masked_fill_(hidden, 0.0)
                keep = block.kept().to(torch.float32).div_(1.0 - p.dropout_p) if p.dropout_p else None
                if dv is not None:
                    kept = prob if keep is None else prob * keep
                    dv_rows[:, :, seen] += kept.flatten(2, 3).transpose(-1, -2) @ do
                if not of_scores:
                    continue
                delta = (do * block.rows(out)).sum(-1, keepdim=True)
                if dlse is not None:
                    delta -= block.rows(dlse[..., None])
                if keep is None:
                    ds = block.split(products(do, v_seen, delta)).mul_(prob)
                else:
                    ds = block.split(products(do, v_seen)).mul_(keep).sub_(block.split(delta)).mul_(prob)
                if hidden is not None:
                    ds.masked_fill_(hidden, 0.0)
                if dmask is not None:
                    block.add_to_mask(dmask, ds)
                if capped is not None:
                    of_capped = 1.0 - capped.div_(p.softcap).square_()
                    ds.mul_(of_capped if hidden is None else of_capped.masked_fill_(hidden, 0.0))
                ds = ds.flatten(2, 3)
                if dq is not None:
                    block.put(dq, block.scaled(ds @ k_seen))
                if dk is not None:
                    dk_rows[:, :, seen] += ds.transpose(-1, -2) @ block.scaled(q_rows)
            if dk is not None:
                keys.add(dk[..., kv, :], group, dk_rows)
            if dv is not None:
                keys.add(dv[..., kv, :], group, dv_rows)
    return Gradients(
        None if dq is None else queries.finished(dq),
        None if dk is None else dk.to(k.dtype),
        None if dv is None else dv.to(v.dtype),
        dsinks,
        None if dmask is None or p.mask is None else dmask.to(p.mask.dtype),
    )


def _zeros_for(p: AttentionProblem, mask: torch.Tensor) -> torch.Tensor:
    """Where the gradient of the mask is added up: in its own dtype if each element is added to once."""
    once = mask.shape[2] == p.max_seqlen_q and not p.ragged_q and not p.ragged_k
    return torch.zeros(mask.shape, dtype=mask.dtype if once else torch.float32, device=mask.device)


def _is_small(lse: torch.Tensor, dtype: torch.dtype) -> bool:
    """Is the rounding of every log-sum-exp little beside that of the dtype? Waits for the device."""
    return bool(((lse.abs() <= LARGE_LSE[dtype]) | (lse == -torch.inf)).all())


def _share(lse: torch.Tensor, own_lse: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
    """How much of a row's whole probability falls to the keys that are here, whose own log-sum-exp is `own_lse`.

    `lse` may be that of more keys. Where both differ by no more than the rounding of a score they mean the same, and
    the share is exactly 1: another tier rounded its scores otherwise, and exp magnifies half an ulp of a large one.
    """
    # Against +inf the share of a row that sees nothing is 0, not NaN.
    difference = own_lse - lse.masked_fill(lse == -torch.inf, torch.inf)
    return difference.masked_fill_(difference.abs() <= rounding, 0.0).exp_()


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


def _may_hold_nonfinite(p: AttentionProblem, rows_are_hidden: bool, *rows: Rows) -> bool:
    """May something that is hidden from some queries be NaN or infinite, so that 0 times it would reach them?

    `rows_are_hidden`: are there keys that only rows which are no queries could see? Where looking would wait for the
    device, the answer is yes: a hidden value never matters, on no tier.
    """
    if p.mask is None and p.window == (-1, -1) and not p.attention_chunk and not rows_are_hidden:
        return False
    tensors = [t for t in rows if isinstance(t, torch.Tensor) and readable(t)]
    return len(tensors) < len(rows) or not all(bool(t.isfinite().all()) for t in tensors)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    return rows.nan_to_num(0.0, 0.0, 0.0)


def _weighted(prob: torch.Tensor, v: Rows, seen: torch.Tensor | None) -> torch.Tensor:
    """p v. With `seen`, a value that is not finite counts for the queries that see its key, and makes them NaN."""

    def part(at: slice, v: torch.Tensor) -> torch.Tensor:
        if seen is None:
            return prob[..., at] @ v
        nonfinite_seen = seen.flatten(2, 3)[..., at].to(torch.float32) @ (~v.isfinite()).to(torch.float32)
        return (prob[..., at] @ _finite(v)).masked_fill_(nonfinite_seen > 0.0, torch.nan)

    return summed(v, part)


TIER = Tier("torch", SERVES, _limits, run, SERVES - {"quantised"} | {LSE_GRADIENT, MASK_GRADIENT}, backward)
