"""The FlashAttention-2 functions (version 2.8): names, parameters, order and defaults are upstream's.

`flash_attn_func` takes a dense batch, `flash_attn_varlen_func` sequences of different lengths joined into one tensor.
The others, which are exported here too, are these two on packed tensors (`fa2_packed`) and attention against a
key-value cache (`fa2_kvcache`). Softmax and accumulation are float32 for every dtype. `flash_attn_mps.problem` has the
semantics of masks, ALiBi and soft-capping in full.

A function that may return a tuple is annotated `Tensor | Any`, unless it has overloads: type checkers then let a caller
use the result as either. The last overload of a function is for a `bool` that is known only when the call is made.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .. import checks
from ..describe import CallOptions, dense, varlen
from .fa2_kvcache import flash_attn_with_kvcache
from .fa2_packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .shared import finish

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


@overload
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
    return_attn_probs: Literal[False] = False,
) -> Tensor: ...


@overload
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
    *,
    return_attn_probs: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
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
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of a dense batch: `softmax(q k^T * softmax_scale) v` for every head. Differentiable.

    A score is scaled, soft-capped, biased by ALiBi and masked, in this order. Positions are counted from the end: the
    last query stands at the last key, so masks are aligned to the bottom right. An x is a key (column) that a query
    (row) sees:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2    seqlen_q=2, seqlen_k=5
        causal=True               causal=True               window_size=(2, 0)
        x x x x .                 . .                       . x x x .
        x x x x x                 . .                       . . x x x
                                  . .
                                  x .
                                  x x

    Args:
        q: queries `(batch, seqlen_q, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        k: keys `(batch, seqlen_k, heads_k, head_dim)`, dtype and device of q. heads_k divides heads: query head h reads
            head `h // (heads // heads_k)` of k and v (grouped-query attention; multi-query where heads_k is 1).
        v: values `(batch, seqlen_k, heads_k, head_dim_v)`, like k; head_dim_v may differ from head_dim.
        dropout_p: probability in [0, 1) that an attention weight is dropped; 0.0 to evaluate. What is dropped follows
            from `torch.manual_seed`.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        window_size: two ints `(left, right)`: query i sees key j if
            `i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right`. A side that is -1 is open. With
            `causal`, right is 0.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        alibi_slopes: float32 `(heads,)` or `(batch, heads)`: `slope * |i + seqlen_k - seqlen_q - j|` is subtracted from
            the score of query i and key j. Gets no gradient.
        deterministic: no effect: results always are.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(batch, seqlen_q, heads, head_dim_v)`, dtype of q, contiguous. A query that sees no key gives zeros.
        With `return_attn_probs`, the tuple `(out, softmax_lse, S_dmask)`. softmax_lse, float32 `(batch, heads,
        seqlen_q)`, is the natural logarithm of the sum of a query's exponentiated scores; -inf where it sees no key.
        S_dmask, for tests: under dropout the probabilities `(batch, heads, seqlen_q, seqlen_k)`, dtype of q, before
        they are divided by `1 - dropout_p`, negative where dropped; else an empty tensor.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, such as another dtype, a larger head_dim, or
            alibi_slopes or softmax_scale that require a gradient.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q = torch.randn(2, 128, 8, 64, dtype=torch.float16, device=device)
        >>> k, v = torch.randn(2, 2, 128, 4, 64, dtype=torch.float16, device=device)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    return finish(dense(q, k, v, options))


@overload
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
    return_attn_probs: Literal[False] = False,
    block_table: Tensor | None = None,
) -> Tensor: ...


@overload
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
    *,
    return_attn_probs: Literal[True],
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
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
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of packed sequences: as `flash_attn_func`, for a batch of different lengths without padding.

    Sequence b has the queries `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` of q, and likewise its keys and values; it
    attends to itself alone. Masks are aligned to the bottom right of each sequence. An x is a key (column) that a query
    (row) sees, by the lengths of a sequence:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2    seqlen_q=2, seqlen_k=5
        causal=True               causal=True               window_size=(2, 0)
        x x x x .                 . .                       . x x x .
        x x x x x                 . .                       . . x x x
                                  . .
                                  x .
                                  x x

    Args:
        q: queries `(total_q, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        k: keys `(total_k, heads_k, head_dim)`, dtype and device of q; heads_k divides heads. With `block_table`, pages
            `(num_blocks, block_size, heads_k, head_dim)`.
        v: values `(total_k, heads_k, head_dim_v)`, or pages like k; head_dim_v may differ from head_dim.
        cu_seqlens_q: int32 `(batch + 1,)`, from 0 to at most total_q: where the queries of each sequence start. Stays
            on the device, as all lengths do.
        cu_seqlens_k: int32 `(batch + 1,)`, from 0 to at most total_k, for the keys. With `block_table` its differences
            are the lengths.
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
        block_table: int32 `(batch, blocks per sequence)`: which pages of k and v hold the keys of each sequence, in
            order; None if k and v are packed.

    Returns:
        out: `(total_q, heads, head_dim_v)`, dtype of q, contiguous. A query that sees no key gives zeros, and so do
            rows behind the last sequence.
        With `return_attn_probs`, the tuple `(out, softmax_lse, S_dmask)`: softmax_lse is float32 `(heads, total_q)`;
        S_dmask under dropout `(batch, heads, max_seqlen_q, max_seqlen_k)`, as in `flash_attn_func`.

    Raises:
        ValueError: a malformed argument, such as lengths that add up to more than total_q, where they can be read
            without waiting for a device. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, as in `flash_attn_func`.

    Example:
        >>> import torch
        >>> from flash_attn import flash_attn_varlen_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q, k, v = torch.randn(3, 7, 8, 64, device=device)  # a sequence of 2 tokens and one of 5
        >>> cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32, device=device)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
        torch.Size([7, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return finish(varlen(q, k, v, *lengths, options, block_table=block_table))
