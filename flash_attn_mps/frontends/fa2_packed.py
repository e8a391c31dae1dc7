"""The FlashAttention-2 functions on packed tensors: keys and values in one, or queries too. See `fa2`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..describe import CallOptions, dense, varlen
from .shared import KV, QKV, finish, unpack

_ONE_LENGTH = {
    "cu_seqlens_q": "cu_seqlens",
    "cu_seqlens_k": "cu_seqlens",
    "max_seqlen_q": "max_seqlen",
    "max_seqlen_k": "max_seqlen",
}


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """`flash_attn_func` with keys and values in one tensor. Differentiable; nothing is copied.

    Masks are aligned to the bottom right. An x is a key (column) that a query (row) sees:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2    seqlen_q=2, seqlen_k=5
        causal=True               causal=True               window_size=(2, 0)
        x x x x .                 . .                       . x x x .
        x x x x x                 . .                       . . x x x
                                  . .
                                  x .
                                  x x

    Args:
        q: queries `(batch, seqlen_q, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        kv: keys and values `(batch, seqlen_k, 2, heads_k, head_dim)`, dtype and device of q; heads_k divides heads.
        dropout_p: probability in [0, 1) that an attention weight is dropped; 0.0 to evaluate.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        alibi_slopes: float32 `(heads,)` or `(batch, heads)`: `slope * |i + seqlen_k - seqlen_q - j|` is subtracted from
            the score of query i and key j. Gets no gradient.
        deterministic: no effect: results always are.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(batch, seqlen_q, heads, head_dim)`, dtype of q, contiguous. A query that sees no key gives zeros.
        With `return_attn_probs`, the tuple `(out, softmax_lse, S_dmask)`: softmax_lse is float32 `(batch, heads,
        seqlen_q)`; S_dmask under dropout `(batch, heads, seqlen_q, seqlen_k)`, as in `flash_attn_func`.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_kvpacked_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q = torch.randn(2, 16, 8, 64, device=device)
        >>> kv = torch.randn(2, 128, 2, 4, 64, device=device)
        >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
        torch.Size([2, 16, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    k, v = unpack(kv, "kv", "batch, seqlen_k, 2, heads_k, head_dim", 2)
    return finish(dense(q, k, v, options, KV))


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """`flash_attn_func` with queries, keys and values in one tensor. Differentiable; nothing is copied.

    An x is a key (column) that a query (row) sees:

        seqlen=4       seqlen=4
        causal=True    window_size=(1, 0)
        x . . .        x . . .
        x x . .        x x . .
        x x x .        . x x .
        x x x x        . . x x

    Args:
        qkv: queries, keys and values `(batch, seqlen, 3, heads, head_dim)`; float16, bfloat16 or float32, head_dim up
            to 512.
        dropout_p: probability in [0, 1) that an attention weight is dropped; 0.0 to evaluate.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i`.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        alibi_slopes: float32 `(heads,)` or `(batch, heads)`: `slope * |i - j|` is subtracted from the score of query i
            and key j. Gets no gradient.
        deterministic: no effect: results always are.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(batch, seqlen, heads, head_dim)`, dtype of qkv, contiguous.
        With `return_attn_probs`, the tuple `(out, softmax_lse, S_dmask)`: softmax_lse is float32 `(batch, heads,
        seqlen)`; S_dmask under dropout `(batch, heads, seqlen, seqlen)`, as in `flash_attn_func`.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_qkvpacked_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> qkv = torch.randn(2, 128, 3, 8, 64, device=device)
        >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    q, k, v = unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim", 3)
    return finish(dense(q, k, v, options, QKV))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
) -> Tensor | Any:
    """`flash_attn_varlen_func` with keys and values in one tensor. Differentiable; nothing is copied.

    Masks are aligned to the bottom right of each sequence. An x is a key (column) that a query (row) sees:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2    seqlen_q=2, seqlen_k=5
        causal=True               causal=True               window_size=(2, 0)
        x x x x .                 . .                       . x x x .
        x x x x x                 . .                       . . x x x
                                  . .
                                  x .
                                  x x

    Args:
        q: queries `(total_q, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        kv: keys and values `(total_k, 2, heads_k, head_dim)`, dtype and device of q; heads_k divides heads.
        cu_seqlens_q: int32 `(batch + 1,)`, from 0 to at most total_q: where the queries of each sequence start.
        cu_seqlens_k: int32 `(batch + 1,)`, from 0 to at most total_k: where the keys of each sequence start.
        max_seqlen_q: the longest sequence of queries, or more: an int or a 0-d integer tensor.
        max_seqlen_k: the longest sequence of keys, or more: an int or a 0-d integer tensor.
        dropout_p: probability in [0, 1) that an attention weight is dropped; 0.0 to evaluate.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        alibi_slopes: float32 `(heads,)` or `(batch, heads)`: `slope * |i + seqlen_k - seqlen_q - j|` is subtracted from
            the score of query i and key j. Gets no gradient.
        deterministic: no effect: results always are.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(total_q, heads, head_dim)`, dtype of q, contiguous. A query that sees no key gives zeros.
        With `return_attn_probs`, the tuple `(out, softmax_lse, S_dmask)`: softmax_lse is float32 `(heads, total_q)`;
        S_dmask under dropout `(batch, heads, max_seqlen_q, max_seqlen_k)`, as in `flash_attn_func`.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_varlen_kvpacked_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q, kv = torch.randn(2, 8, 64, device=device), torch.randn(7, 2, 4, 64, device=device)
        >>> cu_seqlens_q = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
        >>> cu_seqlens_k = torch.tensor([0, 2, 7], dtype=torch.int32, device=device)
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, 1, 5, causal=True).shape
        torch.Size([2, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    k, v = unpack(kv, "kv", "total_k, 2, heads_k, head_dim", 2)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return finish(varlen(q, k, v, *lengths, options, names=KV))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor. Differentiable; nothing is copied.

    An x is a key (column) that a query (row) sees, within each sequence:

        seqlen=4       seqlen=4
        causal=True    window_size=(1, 0)
        x . . .        x . . .
        x x . .        x x . .
        x x x .        . x x .
        x x x x        . . x x

    Args:
        qkv: queries, keys and values `(total, 3, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        cu_seqlens: int32 `(batch + 1,)`, from 0 to at most total: where each sequence starts.
        max_seqlen: the longest sequence, or more: an int or a 0-d integer tensor.
        dropout_p: probability in [0, 1) that an attention weight is dropped; 0.0 to evaluate.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i`.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        alibi_slopes: float32 `(heads,)` or `(batch, heads)`: `slope * |i - j|` is subtracted from the score of query i
            and key j. Gets no gradient.
        deterministic: no effect: results always are.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(total, heads, head_dim)`, dtype of qkv, contiguous.
        With `return_attn_probs`, the tuple `(out, softmax_lse, S_dmask)`: softmax_lse is float32 `(heads, total)`;
        S_dmask under dropout `(batch, heads, max_seqlen, max_seqlen)`, as in `flash_attn_func`.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_varlen_qkvpacked_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> qkv = torch.randn(7, 3, 8, 64, device=device)  # a sequence of 2 tokens and one of 5
        >>> cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32, device=device)
        >>> flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 5, causal=True).shape
        torch.Size([7, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    q, k, v = unpack(qkv, "qkv", "total, 3, heads, head_dim", 3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return finish(varlen(q, k, v, *lengths, options, names={**QKV, **_ONE_LENGTH}))
