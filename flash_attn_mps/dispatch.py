"""Which tier serves a problem, and why the others do not.

A tier is a module with a `name`, `refuse(problem)`, which gives the reasons why it does not serve a problem (none if it
does), and `run(problem)`, which computes it, differentiably.
"""

from __future__ import annotations

from . import cpu, reference, trace
from .problem import AttentionProblem, Result

TIERS = (cpu, reference)  # asked in this order


def attention(p: AttentionProblem) -> Result:
    """Compute `p` on the first tier that serves it."""
    refusals = []
    for tier in TIERS:
        reasons = tier.refuse(p)
        if not reasons:
            trace.record(p, tier.name)
            return tier.run(p)
        refusals.append(f"{tier.name}: {'; '.join(reasons)}")
    raise NotImplementedError("no tier serves this attention call: " + " | ".join(refusals))


def explain(p: AttentionProblem) -> dict[str, list[str]]:
    """Each tier's reasons not to serve `p`, in the order in which they are asked; the first with none serves it."""
    return {tier.name: tier.refuse(p) for tier in TIERS}
