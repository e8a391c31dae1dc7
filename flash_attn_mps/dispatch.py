"""Where every call arrives: an `AttentionProblem` goes to autograd, into a graph, or straight to a tier.

Which tier computes it, forward and backward, is decided in one place, `tiers`.
"""

from __future__ import annotations

import torch

from . import tiers
from .capture import capturing
from .graph import attention_op, autograd, jit_trace, transforms
from .problem import AttentionProblem, Result
from .tiers import Gradients, explain, explain_gradients

__all__ = ["attention", "explain", "explain_gradients", "gradients"]


def attention(p: AttentionProblem, without: frozenset[str] = frozenset()) -> Result:
    """Compute `p` on the first tier that serves it, differentiably; while a graph is captured, when the graph runs.

    `without` the tiers of these names, unless one is forced; ignored while a graph is captured. Raises
    NotImplementedError if no tier serves it.
    """
    if capturing(p.q):
        return attention_op.attention(p)
    if jit_trace.active():
        return jit_trace.attention(p)
    if transforms.active():
        p = transforms.honoured(p)
    if p.requires_grad:
        return autograd.attention(p, without)
    return tiers.run(p, without)


def gradients(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
) -> Gradients:
    """The gradients of the tensors that `needed` names (of `problem.DIFFERENTIABLE`), whichever tier gave `out`, `lse`.

    `dlse` is the gradient of the log-sum-exp, if it has one.
    """
    if capturing(p.q):
        return attention_op.gradients(p, out, lse, dout, dlse, needed)
    if transforms.active():
        p = transforms.honoured(p)
    return tiers.gradients(p, out, lse, dout, dlse, needed)
