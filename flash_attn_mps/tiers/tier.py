"""What a tier is: one way to compute attention, and what it says about the calls that it can compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..problem import FEATURES, AttentionProblem, Result

FORCE = "MTLFLASHATTN_KERNEL"  # the environment's variable that names one tier for all calls


class Gradients(NamedTuple):
    """The gradients of `problem.DIFFERENTIABLE`, in their shapes and dtypes; None where nobody asked for one."""

    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dsinks: torch.Tensor | None = None
    dmask: torch.Tensor | None = None


# (problem, out, lse, dout, dlse, needed) -> gradients, whichever tier gave `out` and `lse`. dlse: the gradient of lse,
# if any. needed: of which of `problem.DIFFERENTIABLE` a gradient is asked for; nothing is computed for another alone.
# None where this machine turns out unable to compute them.
Backward = Callable[
    [AttentionProblem, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", frozenset[str]],
    "Gradients | None",
]

# Features of backward passes alone: has the log-sum-exp a gradient, is one of the mask needed?
LSE_GRADIENT, MASK_GRADIENT = "lse_gradient", "mask_gradient"


# A log-sum-exp of this size is rounded by 2^-24 of it, which is little beside how the dtype rounds a probability.
LARGE_LSE = {torch.float16: 1024.0, torch.bfloat16: 8192.0, torch.float32: 64.0}


@dataclass(frozen=True)
class Tier:
    """One way to compute attention. What it does not name it does not get: no call with a feature outside of `serves`.

    `name`: as `MTLFLASHATTN_KERNEL`, the trace and messages have it.
    `serves`: the features (`problem.FEATURES`) that its forward pass honours; "gradients" among them means the forward
    pass of a call that will be differentiated.
    `limits`: why it does not serve a problem with these features (device, head dims, ...), in words; empty if it does.
    `run`: the forward pass, without autograd. None where this machine turns out unable to.
    `serves_backward`, `backward`, `backward_limits` (None: as `limits`): likewise for gradients; without them, or where
    `backward` gives None, another tier computes these.
    `metal`: does it run Metal kernels?
    """

    name: str
    serves: frozenset[str]
    limits: Callable[[AttentionProblem], list[str]]
    run: Callable[[AttentionProblem], Result | None]
    serves_backward: frozenset[str] = frozenset()
    backward: Backward | None = None
    backward_limits: Callable[[AttentionProblem], list[str]] | None = None
    metal: bool = False

    def unsupported_reasons(self, p: AttentionProblem) -> list[str]:
        """Why it does not compute `p`, in words; empty if it does."""
        if p.features <= self.serves:
            return self.limits(p)
        return _beyond(p.features, self.serves) + self.limits(p)

    def unsupported_backward_reasons(self, p: AttentionProblem, dlse: bool, needed: frozenset[str]) -> list[str]:
        """Why it does not compute the `needed` gradients of `p`. `dlse`: has the log-sum-exp a gradient?"""
        if self.backward is None:
            return ["has no backward pass"]
        features = p.features - {"probabilities"}  # which only a forward pass gives
        if dlse:
            features |= {LSE_GRADIENT}
        if "mask" in needed:
            features |= {MASK_GRADIENT}
        return _beyond(features, self.serves_backward) + (self.backward_limits or self.limits)(p)


def _beyond(needed: frozenset[str], served: frozenset[str]) -> list[str]:
    names = (*FEATURES, LSE_GRADIENT, MASK_GRADIENT)
    return [f"does not support {name}" for name in names if name in needed and name not in served]
