"""The FlashAttention-3 functions, presented as `flash_attn_interface`: names, parameters and defaults are upstream's.

Shapes and semantics are those of `flash_attn_mps.frontends.fa2`. A function returns the output alone, or `(out,
softmax_lse)` with `return_attn_probs`. `qv`, of the shape of the output, adds `qv v^T` to the scores; `attention_chunk`
limits a query to the keys of its own chunk. `num_splits`, `pack_gqa`, `sm_margin` and `scheduler_metadata` are hints
for Hopper GPUs: they are accepted and ignored. `deterministic` is accepted; results always are.
"""

from __future__ import annotations

import torch

from .. import checks, dispatch
from ..problem import AttentionProblem, CallOptions, dense, varlen, with_qv
from . import kvcache
from .cache_call import CacheCall
from .fa2 import unpack

_QKV = {"q": "qkv", "k": "qkv", "v": "qkv"}


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of a dense batch: `(batch, seqlen_q, heads, head_dim of v)`, or `(out, softmax_lse)`."""
    checks.integer(num_splits, "num_splits", "an integer")
    reject(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, want_lse=return_attn_probs, attention_chunk=attention_chunk
    )
    return _finish(dense(q, k, v, options), qv, softmax_scale)


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """`flash_attn_func` on one tensor.

    `qkv` is `(batch, seqlen, 3, heads, head_dim)`, or `(batch, seqlen, num_heads_q + 2 * heads_k, head_dim)`.
    """
    reject(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, want_lse=return_attn_probs, attention_chunk=attention_chunk
    )
    if isinstance(qkv, torch.Tensor) and qkv.dim() == 4:
        accepted = "the number of query heads, with an even number of heads left for k and v"
        if num_heads_q is None:
            raise checks.malformed("num_heads_q", None, f"{accepted}, when qkv has 4 dimensions")
        heads = checks.integer(num_heads_q, "num_heads_q", accepted)
        left = qkv.shape[2] - heads
        if heads <= 0 or left <= 0 or left % 2:
            raise checks.malformed("num_heads_q", f"{heads} of {qkv.shape[2]} heads", accepted)
        q, k, v = qkv.split([heads, left // 2, left // 2], dim=2)
    else:
        q, k, v = unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim", 3)
    return _finish(dense(q, k, v, options, _QKV))


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of packed sequences: `(total_q, heads, head_dim of v)`, or `(out, softmax_lse)`.

    `seqused_q`, `seqused_k` `(batch,)` int32: how many rows of each sequence count; the others give zeros and are not
    seen.
    """
    checks.integer(num_splits, "num_splits", "an integer")
    reject(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, want_lse=return_attn_probs, attention_chunk=attention_chunk
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _finish(varlen(q, k, v, *lengths, options, seqused_q=seqused_q, seqused_k=seqused_k), qv, softmax_scale)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """Attention of a few new tokens against a cache, as `flash_attn_mps.frontends.fa2.flash_attn_with_kvcache`.

    q may be packed, `(total_q, heads, head_dim)` with `cu_seqlens_q` and `max_seqlen_q`; new k and v likewise with
    `cu_seqlens_k_new`. `rotary_seqlens` `(batch,)` int32 replaces `cache_seqlens` as the position where rotation
    starts. With `return_softmax_lse` the result is `(out, softmax_lse, out_accum, softmax_lse_accum)`; the last two
    belong to upstream's splits of the keys and are empty here.
    """
    checks.integer(num_splits, "num_splits", "an integer")
    reject(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    call = CacheCall(
        q,
        k_cache,
        v_cache,
        CallOptions(
            softmax_scale, causal, window_size, softcap, want_lse=return_softmax_lse, attention_chunk=attention_chunk
        ),
        k=k,
        v=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        rotary_seqlens=rotary_seqlens,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=page_table,
        block_table_name="page_table",
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
    )
    result = kvcache.attention(call)
    return (result.out, result.lse, *accumulators(result.out)) if return_softmax_lse else result.out


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Merge attention over parts of the keys into attention over all of them. Returns `(out, softmax_lse)`.

    `out_partial` `(parts, batch, seqlen, heads, head_dim)` or `(parts, total, heads, head_dim)`; `lse_partial`,
    float32, `(parts, batch, seqlen, heads)` or `(parts, total, heads)`. The result has the dtype of `out`, else
    `out_dtype`, else that of `out_partial`; `softmax_lse` is float32 in the layout of `lse_partial`.
    """
    checks.tensor_of_rank(out_partial, "out_partial", (4, 5), "parts, [batch,] seqlen, heads, head_dim")
    checks.tensor_of_rank(lse_partial, "lse_partial", (out_partial.dim() - 1,), "parts, [batch,] seqlen, heads")
    if lse_partial.shape != out_partial.shape[:-1]:
        raise checks.malformed(
            "lse_partial", lse_partial, f"{tuple(out_partial.shape[:-1])}, as out_partial up to head_dim"
        )
    lse = torch.logsumexp(lse_partial.float(), 0)
    # A row that saw no key in any part stays zero: its weights are exp(-inf), not exp(-inf - -inf).
    weights = torch.exp(lse_partial.float() - lse.masked_fill(lse == -torch.inf, 0.0))
    merged = (out_partial.float() * weights[..., None]).sum(0)
    if out is None:
        return merged.to(out_dtype or out_partial.dtype), lse
    if not isinstance(out, torch.Tensor) or out.shape != merged.shape:
        raise checks.malformed("out", out, f"a tensor {tuple(merged.shape)}")
    return out.copy_(merged), lse


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """A plan for Hopper's scheduler, which is not here: an empty int32 tensor, to pass as `scheduler_metadata`."""
    device = cache_seqlens.device if isinstance(cache_seqlens, torch.Tensor) else None
    return torch.empty(0, dtype=torch.int32, device=device)


def _finish(p: AttentionProblem, qv=None, softmax_scale=None):
    result = dispatch.attention(p if qv is None else with_qv(p, qv, softmax_scale))
    return (result.out, result.lse) if p.want_lse else result.out


def accumulators(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream's `out_accum` and `softmax_lse_accum`, of keys that are not split: empty."""
    return out.new_empty(0, dtype=torch.float32), out.new_empty(0, dtype=torch.float32)


def reject(**descales) -> None:
    for name, value in descales.items():
        if value is not None:
            raise checks.unsupported(name, value, "None: there is no fp8 attention here")
