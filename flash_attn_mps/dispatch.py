"""Which tier serves a problem, and why the others do not.

A tier is a module with a `name`, `unsupported_reasons(problem)`, which gives the reasons why it does not serve a
problem (none if it does), and `run(problem)`, which computes it, differentiably, or gives None where this machine turns
out unable to.
"""

from __future__ import annotations

import os
import warnings

import torch

from . import trace
from .graph import attention_op
from .graph.autograd import without_autocast
from .problem import AttentionProblem, Result
from .tiers import cpu, reference
from .tiers.metal import scalar, simdgroup

TIERS = (simdgroup, cpu, reference)  # asked in this order
_FORCE = "MTLFLASHATTN_KERNEL"
_FORCED = {"simdgroup": (simdgroup,), "scalar": (scalar,), "torch": (reference,), "auto": TIERS}
_unknown: set[str] = set()


def attention(p: AttentionProblem, without: tuple = ()) -> Result:
    """Compute `p` on the first tier that serves it; while a graph is captured, have the graph do so when it runs.

    `without` some tiers, unless these are forced.
    """
    if torch.compiler.is_compiling():
        return _captured_attention(p)
    refusals = []
    for tier in [tier for tier in _tiers() if tier not in without] or _tiers():
        reasons = tier.unsupported_reasons(p)
        if not reasons:
            with without_autocast(p.q):
                result = tier.run(p)
            if result is not None:
                trace.record(p, tier.name)
                return result
            reasons = ["its kernel does not compile on this machine"]
        refusals.append(f"{tier.name}: {'; '.join(reasons)}")
    raise NotImplementedError("no tier serves this attention call: " + " | ".join(refusals))


def gradients(
    p: AttentionProblem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of q, k, v and sinks, whichever tier gave `out` and `lse`.

    `dlse` is the gradient of the log-sum-exp, if it has one.
    """
    if torch.compiler.is_compiling():
        return _captured_gradients(p, out, lse, dout, dlse)
    p = p.resolved()
    tier = cpu if cpu in _tiers() and not cpu.unsupported_reasons(p) else reference
    with without_autocast(p.q):
        return tier.backward(p, out, lse, dout, dlse)


_captured_attention, _captured_gradients = attention_op.register(attention, gradients)


def _tiers() -> tuple:
    choice = os.environ.get(_FORCE)
    if choice is None:
        return TIERS
    if choice.lower() not in _FORCED and choice not in _unknown:
        _unknown.add(choice)
        warnings.warn(f"{_FORCE}={choice} is not known; it counts as auto. Known: {', '.join(_FORCED)}.", stacklevel=3)
    return _FORCED.get(choice.lower(), TIERS)


def explain(p: AttentionProblem) -> dict[str, list[str]]:
    """Each tier's reasons not to serve `p`, in the order in which they are asked; the first with none serves it."""
    return {tier.name: tier.unsupported_reasons(p) for tier in _tiers()}
