"""The tiers: who computes an `AttentionProblem`, in the order in which they are asked."""

from __future__ import annotations

import functools
import os
import warnings
from contextlib import nullcontext

import torch

from .. import trace
from ..problem import AttentionProblem, Result
from . import cpu, reference
from .metal import composed, decode, scalar, simdgroup, tensorops
from .tier import FORCE, Gradients, Tier

__all__ = [
    "BY_NAME",
    "FORCE",
    "METAL",
    "ORDER",
    "Gradients",
    "Tier",
    "explain",
    "explain_gradients",
    "gradients",
    "run",
]

ORDER: tuple[Tier, ...] = (decode.TIER, tensorops.TIER, simdgroup.TIER, cpu.TIER, reference.TIER)
BY_NAME = {tier.name: tier for tier in (*ORDER, scalar.TIER)}  # scalar computes only where it is asked for by name
METAL = frozenset(tier.name for tier in BY_NAME.values() if tier.metal)

_REFUSED = "its kernel does not work on this machine"
_AUTO = "auto"
_unknown: set[str] = set()


def run(p: AttentionProblem, without: frozenset[str] = frozenset()) -> Result:
    """The forward pass of `p`, without autograd, on the first tier that serves it. `without` those of these names,
    unless one is forced. Raises NotImplementedError, with every tier's reasons, if none serves it."""
    refusals: trace.Refusals = []
    asked = _asked()
    if without:
        asked = tuple(tier for tier in asked if tier.name not in without) or asked
    for tier in asked:
        reasons = tier.unsupported_reasons(p)
        if not reasons:
            if _is_autocast(p.q.device.type):
                with torch.autocast(p.q.device.type, enabled=False):
                    result = tier.run(p)
            else:
                result = tier.run(p)
            if result is not None:
                if trace.enabled:
                    trace.record(p, tier.name, refusals)
                return result
            reasons = [_REFUSED]
        refusals.append((tier.name, reasons))
    raise NotImplementedError(f"no tier serves this attention call: {_listed(refusals)}")


def gradients(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
) -> Gradients:
    """The gradients of `needed` tensors, whichever tier gave `out` and `lse`: the one rule about who computes them.

    It is the first tier that serves them; a forced one comes first, but forcing a tier without a backward pass does not
    leave a call without gradients. `dlse` is the gradient of the log-sum-exp, if it has one. `needed`: names of
    `problem.DIFFERENTIABLE`.
    """
    order, refusals = _asked_for_gradients(p)
    for tier in order:
        reasons = tier.unsupported_backward_reasons(p, dlse is not None, needed)
        if not reasons and tier.backward is not None:
            off = torch.autocast(p.q.device.type, enabled=False) if _is_autocast(p.q.device.type) else nullcontext()
            with torch.no_grad(), off:
                found = tier.backward(p, out, lse, dout, dlse, needed)
            if found is not None:
                if trace.enabled:
                    trace.record(p, tier.name, refusals, "backward")
                return found
            reasons = [_REFUSED]
        refusals.append((tier.name, reasons))
    raise NotImplementedError(f"no tier computes the gradients of this attention call: {_listed(refusals)}")


def explain(p: AttentionProblem) -> dict[str, list[str]]:
    """Each tier's reasons not to serve `p`, in the order in which they are asked; the first with none serves it."""
    return {tier.name: tier.unsupported_reasons(p) for tier in _asked()}


def explain_gradients(
    p: AttentionProblem, dlse: bool = False, needed: frozenset[str] = frozenset("qkv")
) -> dict[str, list[str]]:
    """Likewise, why each tier does not compute the gradients of `needed`. `dlse`: has the log-sum-exp a gradient?"""
    order, refusals = _asked_for_gradients(p)
    return dict(refusals) | {tier.name: tier.unsupported_backward_reasons(p, dlse, needed) for tier in order}


def _asked_for_gradients(p: AttentionProblem) -> tuple[tuple[Tier, ...], trace.Refusals]:
    """A forced tier, and then those that compute gradients; and who is not asked, since another is faster."""
    asked = _asked()
    if asked is ORDER and composed.is_faster(p):
        return (BY_NAME[reference.TIER.name],), [(simdgroup.TIER.name, [composed.WHY])]
    forced = () if asked is ORDER else asked
    return tuple(dict.fromkeys((*forced, *(tier for tier in ORDER if tier.backward is not None)))), []


def _listed(refusals: trace.Refusals) -> str:
    return " | ".join(f"{name}: {'; '.join(reasons)}" for name, reasons in refusals)


def _asked() -> tuple[Tier, ...]:
    choice = os.environ.get(FORCE)
    if choice is None:
        return ORDER
    forced = BY_NAME.get(choice.lower())
    if forced is not None:
        return (forced,)
    if choice.lower() != _AUTO and choice not in _unknown:
        _unknown.add(choice)
        known = ", ".join((*BY_NAME, _AUTO))
        warnings.warn(f"{FORCE}={choice} is not known; it counts as auto. Known: {known}.", stacklevel=4)
    return ORDER


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def _is_autocast(device: str) -> bool:
    """Is autocast on? A tier runs without: the dtypes of attention are those of its arguments, as upstream has it."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)
