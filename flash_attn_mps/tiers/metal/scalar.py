"""The `scalar` tier: one thread per query (`kernels/scalar.metal`). Exact and slow, for debugging."""

from __future__ import annotations

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import launch
from .specialization import Variant

_VARIANT = Variant(rows=1, simdgroups=1, keys=1, staged=False)


def _run(p: AttentionProblem) -> Result | None:
    return launch.run(p, "attention_scalar", _VARIANT)


TIER = Tier("scalar", launch.FEATURES, launch.limits, _run, metal=True)
