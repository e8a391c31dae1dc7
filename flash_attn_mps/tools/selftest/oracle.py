"""Attention written out, in float64 on the CPU: nothing of it is shared with the tiers.

The semantics are those of `flash_attn_mps.problem`.
"""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(seqlen_q, heads, head_dim of v)` and log-sum-exp `(heads, seqlen_q)` of one sequence.

    q `(seqlen_q, heads, head_dim)`, k and v `(seqlen_k, heads_k, .)`; slopes and sinks `(heads,)`; mask and keep
    `(heads, seqlen_q, seqlen_k)`. Differentiable, also where a query sees nothing.
    """
    q, k, v = q.double(), k.double(), v.double()
    seqlen_q, heads, _ = q.shape
    seqlen_k, group = k.shape[0], heads // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * distance.abs()
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance <= left)
    if right >= 0:
        seen = seen & (distance >= -right)
    s = s.masked_fill(~seen, -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.double()
    if sinks is not None:  # a key that everybody sees, and whose value is zero
        s = torch.cat([s, sinks.double()[:, None, None].expand(heads, seqlen_q, 1)], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:1])]) if seqlen_k else v.new_zeros(1, heads, v.shape[-1])
    blind = (s == -torch.inf).all(-1)  # also where there are no keys
    s = s.masked_fill(blind[..., None], 0.0)
    lse = torch.logsumexp(s, dim=-1) if s.shape[-1] else s.sum(-1)
    p = torch.exp(s - lse[..., None]).masked_fill(blind[..., None], 0.0)
    if keep is not None:
        p = p * keep / (1.0 - dropout_p)
    return torch.einsum("hqk,khd->qhd", p, v), lse.masked_fill(blind, -torch.inf)
