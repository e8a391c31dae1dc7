"""Forward and backward of FlashAttention 3 as plain functions without autograd: upstream's private functions.

As `flash_attn_mps.frontends.fa2_private`, with the parameters of `flash_attn_interface` in upstream's newest order. The
forward function returns `(out, softmax_lse, out_accum, softmax_lse_accum)`; the last two belong to upstream's splits
and are empty here.
"""

from __future__ import annotations

import torch

from .. import checks, dispatch
from ..problem import CallOptions, dense, varlen, with_qv
from . import kvcache
from .cache_call import CacheCall
from .fa2_private import backward
from .fa3 import accumulators, reject


def _flash_attn_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
):
    reject(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    window_size = (window_size_left, window_size_right)
    options = CallOptions(softmax_scale, causal, window_size, softcap, want_lse=True, attention_chunk=attention_chunk)
    # Not a decorator: who builds on this function reads its arguments with inspect.getfullargspec.
    with torch.no_grad():
        if cu_seqlens_k is None and (seqused_k is not None or k_new is not None or page_table is not None):
            _reject("with a key-value cache", seqused_q=seqused_q)
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
                rotary_interleaved=rotary_interleaved,
                rotary_seqlens=seqlens_rotary,
                cache_seqlens=seqused_k,
                cache_batch_idx=kv_batch_idx,
                cache_leftpad=leftpad_k,
                block_table=page_table,
                block_table_name="page_table",
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k_new=cu_seqlens_k_new,
                max_seqlen_q=max_seqlen_q,
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
            )
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
            p = _describe(*lengths, page_table)(q, k, v, options)
            result = dispatch.attention(p if qv is None else with_qv(p, qv, softmax_scale))
        out = result.out if out_ is None else out_.copy_(result.out)
        return out, result.lse, *accumulators(out)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    options = CallOptions(softmax_scale, is_causal, (window_size_left, window_size_right), softcap)
    describe = _describe(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sequed_q, sequed_k, None)
    return backward(describe, (q, k, v), options, dout, out, softmax_lse, (dq, dk, dv))


def _describe(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table):
    """A function from q, k, v and the options to the problem: dense without `cu_seqlens_q`, else packed."""
    if cu_seqlens_q is None:
        # A dense problem has one length for all: a length that is not looked at would give wrong gradients.
        _reject("without cu_seqlens_q", cu_seqlens_k=cu_seqlens_k, sequed_q=seqused_q, sequed_k=seqused_k)
        return dense
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    layout = {"seqused_q": seqused_q, "seqused_k": seqused_k, "block_table": page_table}
    return lambda q, k, v, options: varlen(q, k, v, *lengths, options, **layout)


def _reject(where: str, **arguments) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise checks.unsupported(name, value, f"None {where}")
