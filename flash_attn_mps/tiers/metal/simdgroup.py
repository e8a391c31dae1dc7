"""The `simdgroup` tier: tiled FlashAttention-2 on simdgroup matrices (`kernels/forward.metal`)."""

from __future__ import annotations

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import launch, variants

ENTRY = "attention_forward"


def _run(p: AttentionProblem) -> Result | None:
    return launch.run(p, ENTRY, variants.chosen(p))


TIER = Tier("simdgroup", launch.FEATURES, launch.limits, _run, metal=True)
