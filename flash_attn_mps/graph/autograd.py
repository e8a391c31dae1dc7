"""Gradients for tiers that compute them from the output and the log-sum-exp."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..problem import AttentionProblem, Result

_NOTHING = nullcontext()
_has_autocast = functools.cache(torch.amp.is_autocast_available)


def without_autocast(like: torch.Tensor) -> AbstractContextManager:
    """No autocast on the device of `like`: the dtypes of attention are those of its arguments, as upstream has it."""
    device = like.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


_TENSORS = [field.name for field in dataclasses.fields(AttentionProblem) if "Tensor" in field.type]


def differentiable(p: AttentionProblem, forward: Callable, backward: Callable) -> Result:
    """`forward(p) -> (out, lse, probs)` as a `Result`, with `backward` behind it where a gradient is needed.

    `backward(p, out, lse, dout, dlse)` gives the gradients of q, k, v and sinks. The gradient of the log-sum-exp is
    honoured; second derivatives raise.
    """
    if p.requires_grad:
        out, lse, probs = _Attention.apply(p.q, p.k, p.v, p.sinks, p, forward, backward)
    else:
        out, lse, probs = forward(p)
    return Result(out, lse, probs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, p: AttentionProblem, forward: Any, backward: Any):
        out, lse, probs = forward(p)
        # Every tensor goes through save_for_backward, so that checkpointing and offloading hooks see it.
        ctx.names = [name for name in _TENSORS if isinstance(getattr(p, name), torch.Tensor)]
        ctx.save_for_backward(out, lse, *(getattr(p, name) for name in ctx.names))
        ctx.problem = dataclasses.replace(p, **dict.fromkeys(ctx.names))
        ctx.backward_of = backward
        ctx.set_materialize_grads(False)
        if probs is not None:
            ctx.mark_non_differentiable(probs)
        return out, lse, probs

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _dprobs: Any):
        out, lse, *saved = ctx.saved_tensors
        p = dataclasses.replace(ctx.problem, **dict(zip(ctx.names, saved, strict=True)))
        if dout is None:
            dout = torch.zeros_like(out)
        with torch.no_grad(), without_autocast(dout):
            grads = ctx.backward_of(p, out, lse, dout, dlse)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _NoSecondDerivative.apply(*grads, p.q, p.k, p.v, p.sinks, dout, dlse)
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
        return *wanted, None, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients that depend on the inputs in the graph, so that whoever differentiates them meets an error.

    `once_differentiable` does not see to that: its node has no path to q, k and v, and `torch.autograd.grad` with
    respect to these leaves it out without a word.
    """

    @staticmethod
    def forward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dsinks: torch.Tensor | None, *_: Any):
        return tuple(grad if grad is None else grad.view_as(grad) for grad in (dq, dk, dv, dsinks))

    @staticmethod
    def backward(ctx: Any, *_: Any):
        raise NotImplementedError("flash attention has no second derivative (double backward)")
