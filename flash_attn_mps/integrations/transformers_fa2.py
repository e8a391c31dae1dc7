"""The FlashAttention-2 functions with attention sinks: an extra score for each query of a head, besides its keys.

Upstream's functions have no such argument, so the public ones have none either. transformers hands `s_aux` `(heads,)`
to a function that has a parameter of that name (GPT-OSS), and silently drops it otherwise. These run in place of the
presented functions there (`flash_attn_shim/adjust/transformers.py`). All other parameters are those of
`flash_attn_mps.frontends.fa2`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..describe import CallOptions, dense, varlen
from ..frontends.shared import finish
from ..problem import AttentionProblem, with_sinks


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | Any:
    """`flash_attn_mps.flash_attn_func` with sinks `s_aux` `(heads,)`, not scaled; None for none."""
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    return finish(_with(dense(q, k, v, options), s_aux))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor | Any:
    """`flash_attn_mps.flash_attn_varlen_func` with sinks `s_aux` `(heads,)`, not scaled; None for none."""
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return finish(_with(varlen(q, k, v, *lengths, options, block_table=block_table), s_aux))


def _with(p: AttentionProblem, s_aux: Tensor | None) -> AttentionProblem:
    return p if s_aux is None else with_sinks(p, s_aux, "s_aux")
