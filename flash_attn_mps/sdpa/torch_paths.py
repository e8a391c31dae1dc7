"""What torch itself does with a call on MPS, by release.

Read in the sources and in the wheels of the releases (aten/src/ATen/native/mps/operations/Attention.mm and
aten/src/ATen/native/transformers/attention.cpp of PyTorch):

* `math`: with gradients or dropout, plain matrix products and a softmax, whose scores are kept for the backward pass.
* `vector`: at most 8 queries, fused.
* `prefill`: more queries, fused, from 2.13 on.
* `general`: everything else, a graph of MPSGraph operations over the whole score matrix.
"""

from __future__ import annotations

from .call import Call

Version = tuple[int, int]

MATERIALIZED = ("math", "general")
_SCORE_BYTES = 4  # both upcast to float32
_FUSED_PREFILL: Version = (2, 13)


def version(text: str) -> Version:
    """(2, 13) of "2.13.0+cpu" or "2.14.0.dev20260807"."""
    major, minor = text.split("+", maxsplit=1)[0].split(".")[:2]
    return int(major), int(minor)


def route(call: Call, torch: Version) -> str:
    """The way that torch takes: "math", "vector", "prefill" or "general"."""
    if call.gradient or call.dropout:
        return "math"
    recent = torch >= _FUSED_PREFILL
    masks = ("none", "bool", "same") if recent else ("none", "bool")
    if call.head_dim != call.head_dim_v or call.mask not in masks:
        return "general"
    if call.seqlen_q <= 8:
        dims = (64, 96, 128, 256) if recent else (64, 96, 128)
        served = call.seqlen_q <= call.seqlen_k and call.head_dim in dims and (recent or not call.causal)
        return "vector" if served else "general"
    return "prefill" if recent and call.head_dim in (32, 64, 72, 80, 96, 128, 256) else "general"


def score_bytes(call: Call, torch: Version) -> int:
    """Bytes of the score matrix that torch would allocate; 0 where its kernel is fused."""
    return call.scores * _SCORE_BYTES if route(call, torch) in MATERIALIZED else 0
