"""What a call with some features gets, and how many registers of a lane that takes."""

from __future__ import annotations

from typing import Any

import torch

from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import launch, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import FORWARD, Variant
from metal_host import compile_shader

BATCH, LENGTH, HEADS, PAGE = 2, 256, 2, 16
CAUSAL = {"window_right": 0}
WINDOW = {"window_left": 20, "window_right": 3}


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_LENGTHS = _empty(BATCH + 1)
_PACKED = {"cu_seqlens_q": _LENGTHS, "cu_seqlens_k": _LENGTHS}
_PAGED = {"block_table": _empty(BATCH, LENGTH // PAGE), "seqused_k": _empty(BATCH)}
_DESCALES = dict.fromkeys(("k_descale", "v_descale"), _empty(BATCH, HEADS, dtype=torch.float32))
_SCORES = {
    "softcap": 30.0,
    "alibi_slopes": _empty(BATCH, HEADS, dtype=torch.float32),
    "sinks": _empty(HEADS, dtype=torch.float32),
}


def _mask(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"mask": _empty(BATCH, HEADS, LENGTH, LENGTH, dtype=dtype)}


# Those of a call's features that take registers, alone and together. float8 keys: their codes, with descales.
FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": CAUSAL,
    "window": WINDOW,
    "mask, causal": {**CAUSAL, **_mask(torch.bool)},
    "float mask, window": {**WINDOW, **_mask(torch.float32)},
    "packed, causal": {**CAUSAL, **_PACKED},
    "paged, causal": {**CAUSAL, **_PAGED},
    "paged float8, causal": {**CAUSAL, **_PAGED, **_DESCALES},
    "dropout, causal": {**CAUSAL, "dropout_p": 0.1},
    "softcap, ALiBi, sinks, window": {**WINDOW, **_SCORES},
    "packed, dropout, softcap, ALiBi, window": {**WINDOW, **_PACKED, **_SCORES, "dropout_p": 0.1},
    "mask, dropout, causal": {**CAUSAL, **_mask(torch.bool), "dropout_p": 0.1},
    "all at once": {**WINDOW, **_PAGED, **_SCORES, **_mask(torch.float32), "dropout_p": 0.1},
}


def problem(features: str, dtype: torch.dtype, head_dim: int) -> AttentionProblem:
    """A call with what `FEATURES` has under that name."""
    fields = FEATURES[features]
    q = _empty(BATCH, LENGTH, HEADS, head_dim, dtype=dtype)
    k = q
    if "cu_seqlens_q" in fields:
        q = k = q.flatten(0, 1)
    if "block_table" in fields:
        k = _empty(BATCH * LENGTH // PAGE, PAGE, HEADS, head_dim, dtype=dtype)
    if "k_descale" in fields:
        k = k.to(torch.float8_e4m3fn)
    return AttentionProblem(q, k, k, BATCH, LENGTH, LENGTH, 0.1, want_lse=True, **fields)


def default(p: AttentionProblem) -> Variant:
    """What the tiled kernel runs `p` with where nothing was tuned."""
    return simdgroup.default(p.q.itemsize, p.q.shape[-1], p.v.shape[-1], simdgroup.demands(p))


def live_registers(p: AttentionProblem, variant: Variant) -> int:
    """Of the tiled kernel, counted in its code."""
    outputs = launch.outputs(p)
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": outputs.out, "lse": outputs.lse}
    specialization, _ = launch.arguments(FORWARD, p, variant, tensors)
    return compile_shader(specialization.source(), kernels=[]).live_registers(FORWARD.entry)
