"""The FlashAttention-2 functions with attention sinks: a score that each query of a head has besides its keys.

Upstream's have none, so the public functions do not take them. transformers hands `s_aux` `(heads,)` to a function
that has a parameter of that name (GPT-OSS), and drops it in silence otherwise. Parameters and shapes else are those
of `flash_attn_mps.frontends.fa2`.
"""

from ..frontends.shared import finish
from ..problem import CallOptions, dense, varlen, with_sinks


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
):
    """`flash_attn_mps.flash_attn_func` with sinks `s_aux` `(heads,)`, not scaled; None for none."""
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    return finish(_with(dense(q, k, v, options), s_aux))


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    s_aux=None,
):
    """`flash_attn_mps.flash_attn_varlen_func` with sinks `s_aux` `(heads,)`, not scaled; None for none."""
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return finish(_with(varlen(q, k, v, *lengths, options, block_table=block_table), s_aux))


def _with(p, s_aux):
    return p if s_aux is None else with_sinks(p, s_aux, "s_aux")
