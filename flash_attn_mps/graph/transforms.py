"""Derivatives other than autograd's: forward mode, and the transforms of `torch.func`.

No kernel knows of them: it would compute the value, and lose the rest in silence.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.autograd import forward_ad

from ..problem import AttentionProblem

_transform = torch._C._functorch.peek_interpreter_stack


def active() -> bool:
    """Is some transform of `torch.func`, or forward mode, on? Costs a tenth of a microsecond."""
    return forward_ad._current_level >= 0 or _transform() is not None


def honoured(p: AttentionProblem) -> AttentionProblem:
    """`p`, marked for a tier that carries tangents on if it has some.

    Raises NotImplementedError under `torch.func.grad` and `vmap`, and where both derivatives are wanted at once.
    """
    transform = _transform()
    if transform is not None and (name := transform.key().name) != "Jvp":
        raise NotImplementedError(
            f"attention under the torch.func transform {name} is not supported; supported: torch.autograd for "
            "gradients, torch.func.jvp and dual tensors for tangents, a batch dimension instead of vmap"
        )
    inputs = (p.q, p.k, p.v, p.sinks, p.mask, p.alibi_slopes, p.softmax_scale)
    if transform is None and not any(map(_has_tangent, inputs)):
        return p
    if p.requires_grad:
        raise NotImplementedError(
            "attention of tensors that carry a tangent and require a gradient is not supported; supported: one of both"
        )
    return dataclasses.replace(p, forward_mode=True)


def _has_tangent(value: torch.Tensor | float | None) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
