"""Attention as a function of autograd: `tiers` computes both passes, eagerly."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import tiers
from ..problem import DIFFERENTIABLE, AttentionProblem, Result
from ..tiers import Gradients

_TENSORS = [field.name for field in dataclasses.fields(AttentionProblem) if "Tensor" in str(field.type)]


def attention(p: AttentionProblem, without: frozenset[str]) -> Result:
    """`tiers.run(p, without)` with `tiers.gradients` behind it.

    The gradient of the log-sum-exp is honoured; second derivatives raise NotImplementedError.
    """
    differentiated = dataclasses.replace(p, needs_grad=True, want_lse=True)
    out, lse, probs = _Attention.apply(*_inputs(p), differentiated, without)
    return Result(out, lse if p.want_lse else None, probs)


def _inputs(p: AttentionProblem) -> list[torch.Tensor | None]:
    return [getattr(p, name) for name in DIFFERENTIABLE]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """`inputs`: those of `DIFFERENTIABLE`, which autograd must see, the problem they are part of, and `without`."""
        *_, p, without = inputs
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
        *which, _, _ = ctx.needs_input_grad
        needed = frozenset(name for name, is_needed in zip(DIFFERENTIABLE, which, strict=True) if is_needed)
        grads: tuple[Any, ...] = tiers.gradients(p, out, lse, dout, dlse, needed)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _NoSecondDerivative.apply(*grads, *_inputs(p), dout, dlse)
        return *grads, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients that depend on the inputs in the graph, so that whoever differentiates them meets an error.

    `once_differentiable` does not see to that: its node has no path to q, k and v, and `torch.autograd.grad` with
    respect to these leaves it out without a word.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        grads = inputs[: len(Gradients._fields)]
        return tuple(grad if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("flash attention has no second derivative (double backward)")
