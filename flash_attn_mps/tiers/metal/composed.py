"""Gradients by the backward kernels, or composed of PyTorch's own matrix products: which is faster?

The composed way is the `torch` tier's backward pass, five products and three other passes over the scores, block by
block. The kernels compute seven products (eight where *keys* is split, above a head dim of 128), and never write a
score to memory. So it depends on how arithmetic and memory traffic weigh on a GPU, and on how well its matrix products
run: `mtlflashattn tune --what gradients` measures it.
"""

from __future__ import annotations

from ...problem import AttentionProblem
from . import compiler, variants
from .kernel import LENGTHS, Choice

FUSED, COMPOSED = "fused", "composed"
WHY = "composed of matrix products they are faster for such calls, as tuned or by default"

# What else the torch tier computes it reads, draws or gathers for every score, in passes of its own.
_PLAIN = frozenset({"causal", "gradients"})


def _default(_element_bytes: int, head_dim: int, head_dim_v: int) -> str:
    """By what is counted and published, in flops of a score at the ALU peak.

    A product is 2 D. The kernels reach about 0.65 of the peak: 14 D / 0.65 up to D 128, 16 D / 0.65 beyond. Apple's
    products reach about 0.82 (12.8 TF/s of 14.2 on an M3 Max in half precision, 11.5 in float32): 10 D / 0.82. The
    passes move some 45 bytes, each worth 26 to 38 flops on M1 to M4. Together 2760 against 3130 at D 128, where some
    GPUs will favour the one and some the other, and 6300 against 4700 at D 256.
    """
    return COMPOSED if max(head_dim, head_dim_v) > 128 else FUSED


WAYS = Choice(
    entry="attention_backward",
    variants=(FUSED, COMPOSED),
    fits=lambda *_: True,
    default=_default,
    variable="MTLFLASHATTN_BACKWARD",
    gradients=frozenset("qkv"),
)


def is_faster(p: AttentionProblem) -> bool:
    """Should the `torch` tier compute these gradients, although the kernels could?

    Not those of short calls, whose time is the host's: it launches some twenty operations a block.
    """
    if p.max_seqlen_q <= LENGTHS["short"] or not p.features <= _PLAIN:
        return False
    return p.q.device.type in compiler.device_types and variants.chosen(p, WAYS) == COMPOSED
