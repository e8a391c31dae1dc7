"""The FlashAttention-3 functions, presented as `flash_attn_interface`: names, parameters and defaults are upstream's.

`flash_attn_func` takes a dense batch, `flash_attn_varlen_func` packed sequences; those for a key-value cache are in
`fa3_kvcache` and exported here too. Semantics are those of `fa2`, with `qv` and `attention_chunk` besides, without
dropout and ALiBi. A result that may be a tuple is annotated as there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks, dispatch
from ..describe import CallOptions, dense, varlen
from ..problem import AttentionProblem, with_qv
from .fa3_kvcache import flash_attn_combine, flash_attn_with_kvcache, get_scheduler_metadata
from .shared import QKV, reject_descales, unpack

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """Attention of a dense batch: `softmax(q k^T * softmax_scale) v` for every head. Differentiable.

    A score is scaled, soft-capped and masked, in this order. Positions are counted from the end: the last query stands
    at the last key, so masks are aligned to the bottom right. An x is a key (column) that a query (row) sees:

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
            head `h // (heads // heads_k)` of k and v.
        v: values `(batch, seqlen_k, heads_k, head_dim_v)`, like k; head_dim_v may differ from head_dim.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`, with
            qv for `1 / sqrt(head_dim + head_dim_v)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        qv: `(batch, seqlen_q, heads, head_dim_v)`: adds `qv v^T` to the scores, before the scale; None for nothing.
        q_descale: None: scales of fp8 tensors, which are not supported.
        k_descale: None, likewise.
        v_descale: None, likewise.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        attention_chunk: a query sees only the keys of its own chunk of so many positions; 0 for all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        num_splits: an int: into at most how many parts the keys may be split, to be computed side by side. 1 gives each
            sequence a result that does not depend on the batch around it; 0 or less, as many as suit the GPU.
        pack_gqa: no effect: a hint for Hopper GPUs.
        deterministic: no effect: results always are.
        sm_margin: no effect: a hint for Hopper GPUs.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(batch, seqlen_q, heads, head_dim_v)`, dtype of q, contiguous. A query that sees no key gives zeros.
        With `return_attn_probs`, the tuple `(out, softmax_lse)`. softmax_lse, float32 `(batch, heads, seqlen_q)`, is
        the natural logarithm of the sum of a query's exponentiated scores; -inf where it sees no key.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, such as float8 tensors, head_dim over 512, or a
            softmax_scale that requires a gradient.

    Example:
        >>> import torch
        >>> from flash_attn_interface import flash_attn_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q = torch.randn(2, 128, 8, 64, dtype=torch.float16, device=device)
        >>> k, v = torch.randn(2, 2, 128, 4, 64, dtype=torch.float16, device=device)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    reject_descales(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = CallOptions(
        softmax_scale,
        causal,
        window_size,
        softcap,
        want_lse=return_attn_probs,
        attention_chunk=attention_chunk,
        num_splits=num_splits,
    )
    return _finish(dense(q, k, v, options), qv, softmax_scale)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """`flash_attn_func` with queries, keys and values in one tensor. Differentiable; nothing is copied.

    An x is a key (column) that a query (row) sees:

        seqlen=4       seqlen=4               seqlen=4
        causal=True    window_size=(1, 0)     attention_chunk=2
        x . . .        x . . .                x x . .
        x x . .        x x . .                x x . .
        x x x .        . x x .                . . x x
        x x x x        . . x x                . . x x

    Args:
        qkv: queries, keys and values `(batch, seqlen, 3, heads, head_dim)`, or `(batch, seqlen, num_heads_q + 2 *
            heads_k, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`.
        causal: hide what comes later: query i sees key j if `j <= i`.
        q_descale: None: scales of fp8 tensors, which are not supported.
        k_descale: None, likewise.
        v_descale: None, likewise.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        attention_chunk: a query sees only the keys of its own chunk of so many positions; 0 for all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        deterministic: no effect: results always are.
        num_heads_q: how many of the heads are of queries, where qkv has 4 dimensions; half of the others are of keys.
        sm_margin: no effect: a hint for Hopper GPUs.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(batch, seqlen, heads, head_dim)`, dtype of qkv, contiguous.
        With `return_attn_probs`, the tuple `(out, softmax_lse)`. softmax_lse, float32 `(batch, heads, seqlen)`, is
        the natural logarithm of the sum of a query's exponentiated scores.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, such as float8 tensors, head_dim over 512, or a
            softmax_scale that requires a gradient.

    Example:
        >>> import torch
        >>> from flash_attn_interface import flash_attn_qkvpacked_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> qkv = torch.randn(2, 128, 8 + 2 * 4, 64, device=device)
        >>> flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=8).shape
        torch.Size([2, 128, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    reject_descales(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, want_lse=return_attn_probs, attention_chunk=attention_chunk
    )
    dims = "batch, seqlen, 3, heads, head_dim; or batch, seqlen, heads of q, k and v, head_dim"
    if checks.tensor_of_rank(qkv, "qkv", (4, 5), dims).dim() == 4:
        accepted = "the number of query heads; of those left, half are for k, which must divide it, and half for v"
        if num_heads_q is None:
            raise checks.malformed("num_heads_q", None, f"{accepted}, when qkv has 4 dimensions")
        heads = checks.integer(num_heads_q, "num_heads_q", accepted)
        left = qkv.shape[2] - heads
        if heads <= 0 or left <= 0 or left % 2 or heads % (left // 2):
            raise checks.malformed("num_heads_q", f"{heads} of the {qkv.shape[2]} heads of qkv", accepted)
        q, k, v = qkv.split([heads, left // 2, left // 2], dim=2)
    else:
        q, k, v = unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim", 3)
    return _finish(dense(q, k, v, options, QKV))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """Attention of packed sequences: as `flash_attn_func`, for a batch of different lengths without padding.

    Sequence b has the queries `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` of q, and likewise its keys and values; it
    attends to itself alone. Masks are aligned to the bottom right of each sequence, by the lengths that count. An x is
    a key (column) that a query (row) sees:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2    seqlen_q=2, seqlen_k=5
        causal=True               causal=True               window_size=(2, 0)
        x x x x .                 . .                       . x x x .
        x x x x x                 . .                       . . x x x
                                  . .
                                  x .
                                  x x

    Args:
        q: queries `(total_q, heads, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        k: keys `(total_k, heads_k, head_dim)`, dtype and device of q; heads_k divides heads.
        v: values `(total_k, heads_k, head_dim_v)`, like k; head_dim_v may differ from head_dim.
        cu_seqlens_q: int32 `(batch + 1,)`, from 0 to at most total_q: where the queries of each sequence start. Stays
            on the device, as all lengths do.
        cu_seqlens_k: int32 `(batch + 1,)`, from 0 to at most total_k: where the keys of each sequence start.
        max_seqlen_q: the longest sequence of queries, or more: an int or a 0-d integer tensor.
        max_seqlen_k: the longest sequence of keys, or more: an int or a 0-d integer tensor.
        seqused_q: int32 `(batch,)`: how many queries of each sequence count; the others give zeros. None for all.
        seqused_k: int32 `(batch,)`: how many keys of each sequence count; the others are not seen. None for all.
        softmax_scale: factor of the scores, a number or a 0-d tensor; None for `1 / sqrt(head_dim)`, with
            qv for `1 / sqrt(head_dim + head_dim_v)`.
        causal: hide what comes later: query i sees key j if `j <= i + seqlen_k - seqlen_q`.
        qv: `(total_q, heads, head_dim_v)`: adds `qv v^T` to the scores, before the scale; None for nothing.
        q_descale: None: scales of fp8 tensors, which are not supported.
        k_descale: None, likewise.
        v_descale: None, likewise.
        window_size: two ints `(left, right)`, how many keys before and after its own position a query sees; -1 is
            open. With `causal`, right is 0.
        attention_chunk: a query sees only the keys of its own chunk of so many positions; 0 for all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 for none.
        num_splits: an int: into at most how many parts the keys may be split, to be computed side by side. 1 gives each
            sequence a result that does not depend on the batch around it; 0 or less, as many as suit the GPU.
        pack_gqa: no effect: a hint for Hopper GPUs.
        deterministic: no effect: results always are.
        sm_margin: no effect: a hint for Hopper GPUs.
        return_attn_probs: return a tuple, see below.

    Returns:
        out: `(total_q, heads, head_dim_v)`, dtype of q, contiguous. A query that sees no key gives zeros, and so do
            rows behind the last sequence.
        With `return_attn_probs`, the tuple `(out, softmax_lse)`. softmax_lse, float32 `(heads, total_q)`, is
        the natural logarithm of the sum of a query's exponentiated scores; -inf where it sees no key.

    Raises:
        ValueError: a malformed argument, such as lengths that add up to more than total_q, where they can be read
            without waiting for a device. The message says which, what came and what would be accepted.
        NotImplementedError: a call that nothing here computes, such as float8 tensors, head_dim over 512, or a
            softmax_scale that requires a gradient.

    Example:
        >>> import torch
        >>> from flash_attn_interface import flash_attn_varlen_func
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> q, k, v = torch.randn(3, 7, 8, 64, device=device)  # a sequence of 2 tokens and one of 5
        >>> cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32, device=device)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
        torch.Size([7, 8, 64])
    """
    checks.flag(deterministic, "deterministic")
    reject_descales(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = CallOptions(
        softmax_scale,
        causal,
        window_size,
        softcap,
        want_lse=return_attn_probs,
        attention_chunk=attention_chunk,
        num_splits=num_splits,
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _finish(varlen(q, k, v, *lengths, options, seqused_q=seqused_q, seqused_k=seqused_k), qv, softmax_scale)


def _finish(p: AttentionProblem, qv: Tensor | None = None, softmax_scale: Any = None) -> Tensor | Any:
    result = dispatch.attention(p if qv is None else with_qv(p, qv, softmax_scale))
    return (result.out, result.lse) if p.want_lse else result.out
