"""The `simdgroup` tier: tiled FlashAttention-2 on simdgroup matrices (`kernels/forward.metal`)."""

from __future__ import annotations

from ...problem import AttentionProblem, Result
from . import launch, variants

name = "simdgroup"
ENTRY = "attention_forward"
unsupported_reasons = launch.unsupported_reasons


def run(p: AttentionProblem) -> Result | None:
    return launch.run(p, ENTRY, variants.chosen(p))
