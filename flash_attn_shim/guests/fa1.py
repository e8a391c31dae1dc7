"""FlashAttention 1's names, under which 2.0 and later have the varlen functions.

They do not exist for who asks under `try`, or with `hasattr`: such a program has another way for FlashAttention 2. A
program that imports them without one gets them. It would end there otherwise, and it works on a Mac where flash_attn is
missing (Boltz up to 2.0, OpenFold up to 2.1: `if find_spec("flash_attn")`, and then an import of
`flash_attn_unpadded_kvpacked_func`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_mps.frontends import fa2
from flash_attn_shim import guests
from flash_attn_shim.guests import journal, presence, settings
from flash_attn_shim.guests.source import position, read


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor | Any:
    """`flash_attn_varlen_func` under the name and with the signature of flash-attn 1.0.9."""
    _refuse_top_left(causal, cu_seqlens_q, cu_seqlens_k)
    return fa2.flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor | Any:
    """`flash_attn_varlen_kvpacked_func` under the name and with the signature of flash-attn 1.0.9."""
    _refuse_top_left(causal, cu_seqlens_q, cu_seqlens_k)
    return fa2.flash_attn_varlen_kvpacked_func(
        *(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor | Any:
    """`flash_attn_varlen_qkvpacked_func` under the name and with the signature of flash-attn 1.0.9."""
    return fa2.flash_attn_varlen_qkvpacked_func(
        *(qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal),
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def function(name: str) -> Callable[..., Any] | None:
    """The function of that name, if whoever asks for it now imports it and cannot do without; otherwise None."""
    frame = guests.asking(sys._getframe(2)) if name in presence.OF_VERSION_1 and settings.decides() else None
    if frame is None:
        return None
    where = position(frame)
    source = read(where.file, frame.f_globals)
    for node in source.nodes if source is not None else ():
        if not isinstance(node, ast.ImportFrom) or not node.lineno <= where.line <= (node.end_lineno or 0):
            continue
        if name in (alias.name for alias in node.names) and source is not None and not source.is_guarded(node):
            why = "is there: the program imports FlashAttention 1's name without another way"
            journal.note_call(str(where), name, why)
            return globals()[name]
    return None


def _refuse_top_left(causal, cu_seqlens_q, cu_seqlens_k):
    """flash-attn 1 aligned the causal mask to the top left: the same only where queries and keys are as many."""
    if causal and cu_seqlens_q is not cu_seqlens_k and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise NotImplementedError(
            "causal: flash-attn 1 aligns the mask of sequences with cu_seqlens_q != cu_seqlens_k to the top left, "
            "which is not supported; flash_attn_varlen_func aligns it to the bottom right"
        )
