"""Forward and backward of FlashAttention 3 as plain functions without autograd: upstream's private functions.

As `flash_attn_mps.frontends.fa2_private`, with the parameters of `flash_attn_interface` in upstream's newest order. The
forward function returns `(out, softmax_lse, out_accum, softmax_lse_accum)`; the last two belong to upstream's splits
and are empty here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..describe import CallOptions, dense, varlen
from ..problem import AttentionProblem, with_qv
from . import kvcache
from .cache_call import CacheCall
from .fa2_private import backward
from .shared import accumulators, reject_descales, window_of

# Upstream's names of arguments, where they are not ours.
_PAGES = {"block_table": "page_table"}
_SEQUSED = {"seqused_q": "sequed_q", "seqused_k": "sequed_k"}


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reject_descales(q_descale=q_descale)
    window_size = window_of(window_size_left, window_size_right)
    options = CallOptions(
        softmax_scale,
        causal,
        window_size,
        softcap,
        want_lse=True,
        attention_chunk=attention_chunk,
        num_splits=num_splits,
    )
    # Not a decorator: who builds on this function reads its arguments with inspect.getfullargspec.
    with torch.no_grad():
        if cu_seqlens_k is None and (seqused_k is not None or k_new is not None or page_table is not None):
            call = CacheCall(
                q,
                k,
                v,
                options,
                k=k_new,
                v=v_new,
                qv=qv,
                rotary_cos=rotary_cos,
                rotary_sin=rotary_sin,
                rotary_interleaved=checks.flag(rotary_interleaved, "rotary_interleaved"),
                rotary_seqlens=seqlens_rotary,
                cache_seqlens=seqused_k,
                cache_batch_idx=kv_batch_idx,
                cache_leftpad=leftpad_k,
                block_table=page_table,
                caller="fa3_private",
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k_new=cu_seqlens_k_new,
                max_seqlen_q=max_seqlen_q,
                seqused_q=seqused_q,
                k_descale=k_descale,
                v_descale=v_descale,
            )
            result = kvcache.attention(call)
        else:
            _reject(
                "without a key-value cache (seqused_k, and no cu_seqlens_k)",
                k_new=k_new,
                v_new=v_new,
                cu_seqlens_k_new=cu_seqlens_k_new,
                kv_batch_idx=kv_batch_idx,
                leftpad_k=leftpad_k,
                rotary_cos=rotary_cos,
                rotary_sin=rotary_sin,
                seqlens_rotary=seqlens_rotary,
                k_descale=k_descale,
                v_descale=v_descale,
            )
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
            p = _describe(*lengths, page_table, _PAGES)(q, k, v, options)
            result = dispatch.attention(p if qv is None else with_qv(p, qv, softmax_scale))
        assert result.lse is not None
        out = result.out
        if out_ is not None:
            out = checks.output(out_, "out_", out.shape, out, "as the output of q and v").copy_(out)
        return out, result.lse, *accumulators(out)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | Tensor | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    checks.flag(deterministic, "deterministic")
    window_size = window_of(window_size_left, window_size_right)
    options = CallOptions(softmax_scale, checks.flag(is_causal, "is_causal"), window_size, softcap)
    describe = _describe(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sequed_q, sequed_k, None, _SEQUSED)
    return backward(describe, (q, k, v), options, dout, out, softmax_lse, (dq, dk, dv))


def _describe(
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    seqused_q: Any,
    seqused_k: Any,
    page_table: Any,
    names: Mapping[str, str],
) -> Callable[..., AttentionProblem]:
    """A function from q, k, v and the options to the problem: dense without `cu_seqlens_q`, else packed."""
    if cu_seqlens_q is None:
        # A dense problem has one length for all: a length that is not looked at would give wrong gradients.
        used = {names.get("seqused_q", "seqused_q"): seqused_q, names.get("seqused_k", "seqused_k"): seqused_k}
        _reject("without cu_seqlens_q", cu_seqlens_k=cu_seqlens_k, **used)
        return dense
    checks.tensor(cu_seqlens_q, "cu_seqlens_q", "batch + 1,")  # before it is held against q that it is not packed
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    layout: dict[str, Any] = {"seqused_q": seqused_q, "seqused_k": seqused_k, "block_table": page_table}
    return lambda q, k, v, options: varlen(q, k, v, *lengths, options, **layout, names=names)


def _reject(where: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise checks.unsupported(name, checks.show(value), f"None {where}")
