"""Attention as a function of autograd: `tiers` computes both passes, eagerly."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import tiers
from ..problem import AttentionProblem, Result

_TENSORS = [field.name for field in dataclasses.fields(AttentionProblem) if "Tensor" in str(field.type)]


def attention(p: AttentionProblem, without: frozenset[str]) -> Result:
    """`tiers.run(p, without)` with `tiers.gradients` behind it.

    The gradient of the log-sum-exp is honoured; second derivatives raise NotImplementedError.
    """
    differentiated = dataclasses.replace(p, needs_grad=True, want_lse=True)
    out, lse, probs = _Attention.apply(p.q, p.k, p.v, p.sinks, differentiated, without)
    return Result(out, lse if p.want_lse else None, probs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, p: AttentionProblem, without: frozenset[str]) -> Any:
        result = tiers.run(p, without)
        # Every tensor goes through save_for_backward, so that checkpointing and offloading hooks see it.
        ctx.names = [name for name in _TENSORS if isinstance(getattr(p, name), torch.Tensor)]
        ctx.save_for_backward(result.out, result.lse, *(getattr(p, name) for name in ctx.names))
        without_tensors: dict[str, Any] = dict.fromkeys(ctx.names)
        ctx.problem = dataclasses.replace(p, **without_tensors)
        ctx.set_materialize_grads(False)
        if result.probs is not None:
            ctx.mark_non_differentiable(result.probs)
        return result.out, result.lse, result.probs

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _dprobs: Any) -> Any:
        out, lse, *saved = ctx.saved_tensors
        p = dataclasses.replace(ctx.problem, **dict(zip(ctx.names, saved, strict=True)))
        if dout is None:
            dout = torch.zeros_like(out)
        grads: tuple[Any, ...] = tiers.gradients(p, out, lse, dout, dlse)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _NoSecondDerivative.apply(*grads, p.q, p.k, p.v, p.sinks, dout, dlse)
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
        return *wanted, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients that depend on the inputs in the graph, so that whoever differentiates them meets an error.

    `once_differentiable` does not see to that: its node has no path to q, k and v, and `torch.autograd.grad` with
    respect to these leaves it out without a word.
    """

    @staticmethod
    def forward(ctx: Any, dq: Any, dk: Any, dv: Any, dsinks: Any, *_: Any) -> Any:
        return tuple(grad if grad is None else grad.view_as(grad) for grad in (dq, dk, dv, dsinks))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("flash attention has no second derivative (double backward)")
