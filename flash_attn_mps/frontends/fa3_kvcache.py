"""FlashAttention 3 against a key-value cache, and what belongs to it: the merging of parts, the scheduler's plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..describe import CallOptions
from . import kvcache
from .cache_call import CacheCall
from .shared import accumulators, reject_descales


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | Any:
    """Attention of a few new tokens against a cache: rotate, append to the cache in place, attend, in one call.

    Not differentiable. seqlen_k is the number of keys of a sequence, new ones included; masks are aligned to the bottom
    right. An x is a key (column) that a query (row) sees:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2    seqlen_q=2, seqlen_k=5
        causal=True               causal=True               window_size=(2, 0)
        x x x x .                 . .                       . x x x .
        x x x x x                 . .                       . . x x x
                                  . .
                                  x .
                                  x x

    Args:
        q: queries `(batch, seqlen_q, heads, head_dim)`, or `(total_q, heads, head_dim)` with `cu_seqlens_q`; float16,
            bfloat16 or float32, head_dim up to 512.
        k_cache: cached keys `(batch_cache, seqlen_cache, heads_k, head_dim)`, dtype and device of q; heads_k divides
            heads. With `page_table`, pages `(num_blocks, block_size, heads_k, head_dim)`. Or quantised: float8_e4m3fn,
            float8_e5m2, int8, or uint8, which is bytes of float8_e4m3fn; keys are its numbers times `k_descale`.
        v_cache: cached values `(batch_cache, seqlen_cache, heads_k, head_dim_v)`, or pages like k_cache.
        k: new keys `(batch, seqlen_new, heads_k, head_dim)`, or `(total_new, heads_k, head_dim)` with
            `cu_seqlens_k_new`, written into k_cache from row `cache_seqlens` on. Dtype of q; into a quantised cache,
            `k / k_descale` rounded to the nearest number that it can hold.
        v: new values, head_dim_v instead of head_dim, written into v_cache; given if k is.
        qv: of the shape of out: adds `qv v^T` to the scores, before the scale; None for nothing.
        rotary_cos: cosines `(seqlen_ro, rotary_dim / 2)`, dtype of q: rotary embedding of q and k. Keys rotate by the
            positions `cache_seqlens + 0, 1, ...`; so do queries if causal, windowed or in chunks, else all by
            `cache_seqlens`. Needs k and v; None for none.
        rotary_sin: sines, of the shape of rotary_cos; given if rotary_cos is.
        cache_seqlens: how many keys each sequence has in the cache, an int or int32 `(batch,)`; None if it is full.
        cache_batch_idx: int32 `(batch,)`: which entry of the cache a sequence uses, with `page_table` which row of
            that; None for its own.
        cache_leftpad: int32 `(batch,)`: at which row of the cache a sequence starts; None for 0.
        page_table: int32 `(batch, blocks per sequence)`: which pages of the cache a sequence has, in order.
        cu_seqlens_q: int32 `(batch + 1,)`, from 0 to at most total_q: where the queries of each sequence start; None if
            q is not packed.
        cu_seqlens_k_new: int32 `(batch + 1,)`, from 0 to at most total_new, for the new keys; None if k is not packed.
        max_seqlen_q: the longest sequence of queries, or more, with `cu_seqlens_q`: an int or a 0-d integer tensor.
        rotary_seqlens: int32 `(batch,)`: positions to rotate from, instead of `cache_seqlens`; no effect without
            rotary_cos.
        q_descale: None: scales of fp8 tensors, which are not supported.
        k_descale: float32 `(batch, heads_k)`: what the numbers of a quantised k_cache are multiplied by, for each
            sequence and head; None for 1.
        v_descale: likewise of v_cache.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`, with
            qv for `1 / sqrt(head_dim + head_dim_v)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        attention_chunk: a query sees only the keys of its own chunk of so many positions; 0 for all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        rotary_interleaved: rotate pairs of neighbours, 0 and 1, 2 and 3, ... (GPT-J); else element i of the first half
            of rotary_dim with element i of the second (GPT-NeoX).
        scheduler_metadata: no effect: what `get_scheduler_metadata` returned.
        num_splits: an int: into at most how many parts the keys may be split, to be computed side by side. 1 gives each
            sequence a result that does not depend on the batch around it; 0 or less, as many as suit the GPU.
        pack_gqa: no effect: a hint for Hopper GPUs.
        sm_margin: no effect: a hint for Hopper GPUs.
        return_softmax_lse: return a tuple, see below.

    Returns:
        out: `(batch, seqlen_q, heads, head_dim_v)` or `(total_q, heads, head_dim_v)`, dtype of q, contiguous. A query
        that sees no key gives zeros.
        With `return_softmax_lse`, the tuple `(out, softmax_lse, out_accum, softmax_lse_accum)`. softmax_lse, float32
        `(batch, heads, seqlen_q)` or `(heads, total_q)`, is the natural logarithm of the sum of a query's exponentiated
        scores; -inf where it sees no key. The other two belong to upstream's splits of the keys and are empty here.

    Raises:
        ValueError: a malformed argument, such as new keys that the cache has no room for, where lengths can be read
            without waiting for a device. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`; and `backward` of the result.

    Example:
        >>> import torch
        >>> from flash_attn_interface import flash_attn_with_kvcache
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> k_cache, v_cache = torch.zeros(2, 1, 256, 4, 64, device=device)  # room for 256 tokens
        >>> q, k, v = (torch.randn(1, 1, heads, 64, device=device) for heads in (8, 4, 4))
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=100, causal=True).shape
        torch.Size([1, 1, 8, 64])
        >>> torch.equal(k_cache[:, 100:101], k)
        True
    """
    return_softmax_lse = checks.flag(return_softmax_lse, "return_softmax_lse")
    reject_descales(q_descale=q_descale)
    call = CacheCall(
        q,
        k_cache,
        v_cache,
        CallOptions(
            softmax_scale,
            causal,
            window_size,
            softcap,
            want_lse=return_softmax_lse,
            attention_chunk=attention_chunk,
            num_splits=num_splits,
        ),
        k=k,
        v=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=checks.flag(rotary_interleaved, "rotary_interleaved"),
        rotary_seqlens=rotary_seqlens,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=page_table,
        caller="fa3",
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    result = kvcache.attention(call)
    return (result.out, result.lse, *accumulators(result.out)) if return_softmax_lse else result.out


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys into attention over all of them.

    Args:
        out_partial: `(parts, batch, seqlen, heads, head_dim)` or `(parts, total, heads, head_dim)`, any floating dtype:
            the outputs for each part of the keys.
        lse_partial: float32 `(parts, batch, seqlen, heads)` or `(parts, total, heads)`: the natural logarithm of the
            sum of exponentiated scores over each part; -inf where a query sees none of its keys.
        out: a tensor of the shape of the result to write it into; None for a new one.
        out_dtype: dtype of the result where out is None; None for that of out_partial.

    Returns:
        The tuple `(out, softmax_lse)`: out as out_partial without its first dimension, softmax_lse likewise as
        lse_partial, float32.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.

    Example:
        >>> import torch
        >>> from flash_attn_interface import flash_attn_combine, flash_attn_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q, k, v = torch.randn(3, 1, 8, 2, 64, device=device)
        >>> halves = [
        ...     flash_attn_func(q, k[:, rows], v[:, rows], return_attn_probs=True)
        ...     for rows in (slice(0, 4), slice(4, 8))
        ... ]
        >>> out_partial = torch.stack([out for out, _ in halves])
        >>> lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in halves])
        >>> out, softmax_lse = flash_attn_combine(out_partial, lse_partial)
        >>> torch.allclose(out, flash_attn_func(q, k, v), atol=1e-5)
        True
    """
    checks.tensor_of_rank(out_partial, "out_partial", (4, 5), "parts, [batch,] seqlen, heads, head_dim")
    if not out_partial.is_floating_point():
        raise checks.malformed("out_partial", out_partial, "a tensor of a floating dtype")
    shape = out_partial.shape[:-1]
    checks.of_shape(lse_partial, "lse_partial", shape, torch.float32, out_partial, "as out_partial up to head_dim")
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise checks.malformed("out_dtype", checks.show(out_dtype), "None or a floating dtype")
    lse = torch.logsumexp(lse_partial, 0)
    # A row that saw no key in any part stays zero: its weights are exp(-inf), not exp(-inf - -inf).
    weights = torch.exp(lse_partial - lse.masked_fill(lse == -torch.inf, 0.0))
    merged = (out_partial.float() * weights[..., None]).sum(0)
    if out is None:
        return merged.to(out_dtype or out_partial.dtype), lse
    return checks.output(out, "out", merged.shape, merged, "as a part of out_partial").copy_(merged), lse


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """A plan for Hopper's scheduler, which is not here. Programs pass it on as `scheduler_metadata`.

    Args:
        batch_size: how many sequences.
        max_seqlen_q: the longest sequence of queries.
        max_seqlen_k: the longest sequence of keys.
        num_heads_q: heads of queries.
        num_heads_kv: heads of keys and values.
        headdim: head_dim of queries and keys.
        cache_seqlens: int32 `(batch,)`, as in `flash_attn_with_kvcache`; the result is on its device.
        qkv_dtype: dtype of queries, keys and values.
        headdim_v: head_dim of values; None for headdim.
        cu_seqlens_q: int32 `(batch + 1,)`, as in `flash_attn_with_kvcache`.
        cu_seqlens_k_new: int32 `(batch + 1,)`, as in `flash_attn_with_kvcache`.
        cache_leftpad: int32 `(batch,)`, as in `flash_attn_with_kvcache`.
        page_size: rows of a page, of a paged cache.
        max_seqlen_k_new: the most new keys of a sequence.
        causal: as in `flash_attn_with_kvcache`.
        window_size: two ints, as in `flash_attn_with_kvcache`.
        attention_chunk: an int, as in `flash_attn_with_kvcache`.
        has_softcap: is there a softcap?
        num_splits: an int, as in `flash_attn_with_kvcache`.
        pack_gqa: a hint for Hopper GPUs.
        sm_margin: a hint for Hopper GPUs.

    Returns:
        An empty int32 tensor.

    Raises:
        Nothing: no argument is looked at, but for the device of cache_seqlens.

    Example:
        >>> import torch
        >>> from flash_attn_interface import get_scheduler_metadata
        >>> get_scheduler_metadata(1, 1, 256, 8, 4, 64, torch.tensor([100], dtype=torch.int32)).numel()
        0
    """
    device = cache_seqlens.device if isinstance(cache_seqlens, torch.Tensor) else None
    return torch.empty(0, dtype=torch.int32, device=device)
