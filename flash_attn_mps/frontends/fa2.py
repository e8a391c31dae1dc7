"""The FlashAttention-2 functions (version 2.8): names, parameters, order and defaults are upstream's.

Shapes: q `(batch, seqlen_q, heads, head_dim)`, k and v `(batch, seqlen_k, heads_k, head_dim)`; packed ("varlen") calls
join the sequences of a batch into `(total, heads, head_dim)` with `cu_seqlens` `(batch + 1,)` int32. `heads` must be a
multiple of `heads_k`; the head_dim of v may differ from that of q and k. dtypes: float16, bfloat16, float32; all
softmax arithmetic is float32. The semantics of masks, ALiBi and soft-capping are in `flash_attn_mps.problem`.

Parameters that all functions share:

* `dropout_p`: probability with which an attention weight is dropped; reproducible by `torch.manual_seed`.
* `softmax_scale`: None for `1 / sqrt(head_dim)`, a number, or a 0-d tensor.
* `causal`, `window_size` `(left, right)`: which keys a query sees, counted from the bottom right; -1 is open.
* `softcap`: scores become `softcap * tanh(score / softcap)`; 0 is off.
* `alibi_slopes`: float32 `(heads,)` or `(batch, heads)`; adds `- slope * distance` to each score.
* `deterministic`: accepted; results always are.
* `return_attn_probs`: return `(out, softmax_lse, S_dmask)`: the output, the natural log-sum-exp of the scores, float32
  `(batch, heads, seqlen_q)` or `(heads, total_q)`, and, under dropout, the probabilities `(batch, heads, seqlen_q,
  seqlen_k)`, negative where dropped; else an empty tensor.

Errors: `ValueError` for a malformed call and `NotImplementedError` for what no tier serves; both name the argument.
"""

from __future__ import annotations

import torch

from .. import checks, dispatch
from ..problem import AttentionProblem, CallOptions, dense, varlen
from . import kvcache
from .cache_call import CacheCall

_QKV = {"q": "qkv", "k": "qkv", "v": "qkv"}
_KV = {"k": "kv", "v": "kv"}
_ONE_LENGTH = {
    "cu_seqlens_q": "cu_seqlens",
    "cu_seqlens_k": "cu_seqlens",
    "max_seqlen_q": "max_seqlen",
    "max_seqlen_k": "max_seqlen",
}


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
):
    """Attention of a dense batch.

    Returns `(batch, seqlen_q, heads, head_dim of v)`. See the module for the parameters.
    """
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    return finish(dense(q, k, v, options))


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with keys and values in one tensor, `kv` `(batch, seqlen_k, 2, heads_k, head_dim)`."""
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    k, v = unpack(kv, "kv", "batch, seqlen_k, 2, heads_k, head_dim", 2)
    return finish(dense(q, k, v, options, _KV))


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with queries, keys and values in one tensor, `qkv` `(batch, seqlen, 3, heads, head_dim)`."""
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    q, k, v = unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim", 3)
    return finish(dense(q, k, v, options, _QKV))


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
):
    """Attention of packed sequences. Returns `(total_q, heads, head_dim of v)`.

    q `(total_q, heads, head_dim)`, k and v `(total_k, heads_k, head_dim)`; `max_seqlen_q` and `max_seqlen_k` are ints
    or 0-d tensors. With `block_table` `(batch, blocks per sequence)` int32, k and v are pages `(num_blocks, block_size,
    heads_k, head_dim)` and `cu_seqlens_k` gives the lengths. `cu_seqlens` stay on the device.
    """
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return finish(varlen(q, k, v, *lengths, options, block_table=block_table))


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
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
):
    """`flash_attn_varlen_func` with keys and values in one tensor, `kv` `(total_k, 2, heads_k, head_dim)`."""
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    k, v = unpack(kv, "kv", "total_k, 2, heads_k, head_dim", 2)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return finish(varlen(q, k, v, *lengths, options, names=_KV))


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with queries, keys and values in one tensor, `qkv` `(total, 3, heads, head_dim)`."""
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    q, k, v = unpack(qkv, "qkv", "total, 3, heads, head_dim", 3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return finish(varlen(q, k, v, *lengths, options, names={**_QKV, **_ONE_LENGTH}))


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention of a few new tokens against a cache. Returns `out`, or `(out, softmax_lse)` with `return_softmax_lse`.

    q `(batch, seqlen_q, heads, head_dim)`. `k_cache`, `v_cache` `(batch_cache, seqlen_cache, heads_k, head_dim)`, or
    pages `(num_blocks, block_size, heads_k, head_dim)` with `block_table` `(batch, blocks per sequence)` int32.
    `cache_seqlens`, an int or `(batch,)` int32, is how many keys each sequence has. `k` and `v` `(batch, seqlen_new,
    heads_k, head_dim)` are written behind them, in place, before attention. `rotary_cos`, `rotary_sin` `(seqlen_ro,
    rotary_dim / 2)` rotate q and the new k (adjacent pairs if `rotary_interleaved`, else halves): k at positions
    `cache_seqlens + 0, 1, ...`, q likewise if causal or windowed, else all at `cache_seqlens`. `cache_batch_idx`
    `(batch,)` int32 says which entry of the cache a sequence uses, `cache_leftpad` `(batch,)` int32 at which row it
    starts. `num_splits` is a hint that is ignored.

    Not differentiable: backward raises `NotImplementedError`.
    """
    checks.integer(num_splits, "num_splits", "an integer")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, want_lse=return_softmax_lse)
    call = CacheCall(
        q,
        k_cache,
        v_cache,
        options,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    result = kvcache.attention(call)
    return (result.out, result.lse) if return_softmax_lse else result.out


def finish(p: AttentionProblem):
    """Compute `p`; the output, or with `want_lse` what `return_attn_probs` promises."""
    result = dispatch.attention(p)
    if not p.want_lse:
        return result.out
    probs = result.out.new_empty(0) if result.probs is None else result.probs
    return result.out, result.lse, probs


def unpack(packed, name: str, dims: str, parts: int) -> tuple[torch.Tensor, ...]:
    """Views of the parts of a packed tensor, along its third dimension from the end."""
    checks.tensor(packed, name, dims)
    if packed.shape[-3] != parts:
        raise checks.malformed(name, packed, f"a tensor ({dims})")
    return packed.unbind(-3)
