"""The `simdgroup` tier: tiled FlashAttention-2 on simdgroup matrices (`kernels/forward.metal`)."""

from __future__ import annotations

from ..problem import AttentionProblem, Result
from . import launch, variants

name = "simdgroup"
refuse = launch.refuse


def run(p: AttentionProblem) -> Result | None:
    variant = variants.default(p.q.itemsize, p.q.shape[-1], p.v.shape[-1])
    return launch.run(p, "attention_forward", variant)
