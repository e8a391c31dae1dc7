"""FlashAttention 2's attention against a key-value cache. See `fa2` for the other functions, `kvcache` for the work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..describe import CallOptions
from . import kvcache
from .cache_call import CacheCall


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
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
        q: queries `(batch, seqlen_q, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        k_cache: cached keys `(batch_cache, seqlen_cache, heads_k, head_dim)`, dtype and device of q; heads_k divides
            heads. With `block_table`, pages `(num_blocks, block_size, heads_k, head_dim)`.
        v_cache: cached values `(batch_cache, seqlen_cache, heads_k, head_dim_v)`, or pages like k_cache.
        k: new keys `(batch, seqlen_new, heads_k, head_dim)`, written into k_cache from row `cache_seqlens` on.
        v: new values `(batch, seqlen_new, heads_k, head_dim_v)`, written into v_cache; given if k is.
        rotary_cos: cosines `(seqlen_ro, rotary_dim / 2)`, dtype of q: rotary embedding of q and k. Keys rotate by the
            positions `cache_seqlens + 0, 1, ...`; so do queries if causal or windowed, else all by `cache_seqlens`.
            Needs k and v; None for none.
        rotary_sin: sines, of the shape of rotary_cos; given if rotary_cos is.
        cache_seqlens: how many keys each sequence has in the cache, an int or int32 `(batch,)`; None if it is full.
        cache_batch_idx: int32 `(batch,)`: which entry of the cache a sequence uses, with `block_table` which row of
            that; None for its own.
        cache_leftpad: int32 `(batch,)`: at which row of the cache a sequence starts; None for 0.
        block_table: int32 `(batch, blocks per sequence)`: which pages of the cache a sequence has, in order.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        rotary_interleaved: rotate pairs of neighbours, 0 and 1, 2 and 3, ... (GPT-J); else element i of the first half
            of rotary_dim with element i of the second (GPT-NeoX).
        alibi_slopes: float32 `(heads,)` or `(batch, heads)`: `slope * |i + seqlen_k - seqlen_q - j|` is subtracted from
            the score of query i and key j.
        num_splits: an int: into at most how many parts the keys may be split, to be computed side by side. 1 gives each
            sequence a result that does not depend on the batch around it; 0 or less, as many as suit the GPU.
        return_softmax_lse: return a tuple, see below.

    Returns:
        out: `(batch, seqlen_q, heads, head_dim_v)`, dtype of q, contiguous. A query that sees no key gives zeros.
        With `return_softmax_lse`, the tuple `(out, softmax_lse)`. softmax_lse, float32 `(batch, heads, seqlen_q)`, is
        the natural logarithm of the sum of a query's exponentiated scores; -inf where it sees no key.

    Raises:
        ValueError: a malformed argument, such as new keys that the cache has no room for, where lengths can be read
            without waiting for a device. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`; and `backward` of the result.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_with_kvcache
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> k_cache, v_cache = torch.zeros(2, 1, 256, 4, 64, device=device)  # room for 256 tokens
        >>> q, k, v = (torch.randn(1, 1, heads, 64, device=device) for heads in (8, 4, 4))
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=100, causal=True).shape
        torch.Size([1, 1, 8, 64])
        >>> torch.equal(k_cache[:, 100:101], k)
        True
    """
    return_softmax_lse = checks.flag(return_softmax_lse, "return_softmax_lse")
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, alibi_slopes, want_lse=return_softmax_lse, num_splits=num_splits
    )
    call = CacheCall(
        q,
        k_cache,
        v_cache,
        options,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=checks.flag(rotary_interleaved, "rotary_interleaved"),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    result = kvcache.attention(call)
    return (result.out, result.lse) if return_softmax_lse else result.out
