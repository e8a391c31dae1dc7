"""Attention in a graph of `torch.jit.trace` (Core ML, TorchScript, the older ONNX export), in plain operations.

The tracer records what torch computes, and neither kernels nor operators of Python. What it cannot record would be
wrong later without a word: a Metal kernel leaves an empty tensor in the graph, lengths that the host reads become
constants.
So a traced call is written out here, for any lengths of dense tensors and with derivatives of its own; others raise.
"""

from __future__ import annotations

import torch

from ..problem import FEATURES, AttentionProblem, Result

SERVES = frozenset({"causal", "window", "softcap", "alibi", "mask", "sinks", "scale_tensor", "gradients"})


def active() -> bool:
    """Is torch.jit.trace recording?"""
    return torch._C._get_tracing_state() is not None


def attention(p: AttentionProblem) -> Result:
    """Output and log-sum-exp. Raises NotImplementedError for what a trace would get wrong with other tensors."""
    refused = [name for name in FEATURES if name in p.features - SERVES]
    if refused:
        raise NotImplementedError(
            f"attention with {', '.join(refused)} cannot be recorded by torch.jit.trace: the graph would hold for "
            "these tensors alone; supported: dense calls without dropout, or torch.export, for graphs of any lengths"
        )
    group = int(p.heads) // int(p.heads_k)
    q, k, v = (x.float().transpose(1, 2) for x in (p.q, p.k, p.v))
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = (q * p.softmax_scale) @ k.transpose(-1, -2)
    if p.softcap:
        s = p.softcap * torch.tanh(s / p.softcap)
    seqlen_q, seqlen_k = s.shape[-2], s.shape[-1]
    # How many keys lie between the query's own place and the key.
    distance = torch.arange(seqlen_k, device=s.device) - (
        torch.arange(seqlen_q, device=s.device)[:, None] - seqlen_q + seqlen_k
    )
    if p.alibi_slopes is not None:
        slopes = p.alibi_slopes if p.alibi_slopes.ndim == 2 else p.alibi_slopes[None]
        s = s - slopes[:, :, None, None] * distance.abs()
    if p.mask is not None:
        s = s.masked_fill(~p.mask, -torch.inf) if p.mask.dtype is torch.bool else s + p.mask
    # The window as the call has it: one that is open at these lengths need not be at others.
    if p.window_left >= 0:
        s = s.masked_fill(distance < -p.window_left, -torch.inf)
    if p.window_right >= 0:
        s = s.masked_fill(distance > p.window_right, -torch.inf)
    sinks = None if p.sinks is None else p.sinks.float()[:, None, None]
    most = s.detach().amax(-1, keepdim=True)
    most = most if sinks is None else torch.maximum(most, sinks.detach())
    finite = most.masked_fill(most == -torch.inf, 0.0)
    weights = torch.exp(s - finite)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - finite)
    out = (weights @ v) / total.masked_fill(total == 0.0, 1.0)
    lse = (torch.log(total) + finite)[..., 0]
    return Result(out.to(p.q.dtype).transpose(1, 2).contiguous(), lse)
