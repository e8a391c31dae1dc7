"""`flash_attn.utils.testing`: random padding, packed forms of q, k and v, and attention written out."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from flash_attn.bert_padding import pad_input, unpad_input


def generate_random_padding_mask(
    max_seqlen: int,
    batch_size: int,
    device: torch.device | str | None,
    mode: str = "random",
    zero_lengths: bool = False,
) -> Tensor:
    """A mask `(batch_size, max_seqlen)`, True for the first tokens of each row.

    Args:
        mode: lengths are "full", "random" (at most 20 less than full) or "third" (at least a third of full).
        zero_lengths: every fifth row and the last one are empty, and random ones may be.
    """
    if mode == "full":
        least = max_seqlen
    elif mode == "random":
        least = max(0 if zero_lengths else 1, max_seqlen - 20)
    elif mode == "third":
        least = max_seqlen // 3
    else:
        raise ValueError(f"mode must be 'full', 'random' or 'third', got {mode!r}")
    lengths = torch.randint(least, max_seqlen + 1, (batch_size, 1), device=device)
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def generate_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    qv: Tensor | None = None,
    kvpacked: bool = False,
    qkvpacked: bool = False,
    query_unused_mask: Tensor | None = None,
    key_unused_mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """Packed tokens of padded q, k and v, as leaves that require a gradient, and functions that pad again.

    Args:
        q, k, v: `(batch, seqlen, heads, head_dim)`. qv: as q, with the head_dim of v.
        query_padding_mask, key_padding_mask: `(batch, seqlen)`, bool, True for valid tokens; None for all.
        query_unused_mask, key_unused_mask: tokens that get a place but are not valid; neither `kvpacked` nor
            `qkvpacked`.

    Returns:
        tuple: by default `(q, k, v, qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q,
            max_seqlen_k)` packed,
        then `(q, k, v, qv)` padded, then the functions for the output, dq, and dk or dv. With `kvpacked`:
        `(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, kv)` and the functions for the output, dq
        and dkv. With `qkvpacked`: `(qkv, cu_seqlens, max_seqlen, qkv)` and the functions for the output and dqkv.
    """
    if kvpacked and qkvpacked:
        raise ValueError("kvpacked and qkvpacked exclude each other")
    if (kvpacked or qkvpacked) and (query_unused_mask is not None or key_unused_mask is not None):
        raise ValueError("query_unused_mask and key_unused_mask need kvpacked=False and qkvpacked=False")
    batch = q.shape[0]

    def pack(x, mask, unused_mask):
        """`(packed, cu_seqlens, max_seqlen, seqused, function that pads)`."""
        seqlen = x.shape[1]
        if mask is None:
            bounds = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=x.device)
            return x.flatten(0, 1), bounds, seqlen, None, lambda y: y.unflatten(0, (batch, seqlen))
        packed, indices, bounds, longest, seqused = unpad_input(x, mask, unused_mask)
        return packed, bounds, longest, seqused, lambda y: pad_input(y, indices, batch, seqlen)

    def leaf(x):
        return x.detach().requires_grad_()

    q_packed, bounds_q, longest_q, seqused_q, pad_q = pack(q, query_padding_mask, query_unused_mask)
    k_packed, bounds_k, longest_k, seqused_k, pad_k = pack(k, key_padding_mask, key_unused_mask)
    v_packed = pack(v, key_padding_mask, key_unused_mask)[0]
    if qkvpacked:
        if q.shape != k.shape or not torch.equal(bounds_q, bounds_k):
            raise ValueError("qkvpacked needs q and k of one shape and one padding mask")
        qkv_packed, qkv = torch.stack([q_packed, k_packed, v_packed], dim=1), torch.stack([q, k, v], dim=2)
        return leaf(qkv_packed), bounds_q, longest_q, leaf(qkv), pad_q, pad_q
    if kvpacked:
        kv_packed, kv = torch.stack([k_packed, v_packed], dim=1), torch.stack([k, v], dim=2)
        lengths = bounds_q, bounds_k, longest_q, longest_k
        return leaf(q_packed), leaf(kv_packed), *lengths, leaf(q), leaf(kv), pad_q, pad_q, pad_k
    qv_packed = None if qv is None else pack(qv, query_padding_mask, query_unused_mask)[0].detach()
    return (
        *(leaf(q_packed), leaf(k_packed), leaf(v_packed), qv_packed),
        *(bounds_q, bounds_k, seqused_q, seqused_k, longest_q, longest_k),
        *(leaf(q), leaf(k), leaf(v), None if qv is None else qv.detach()),
        *(pad_q, pad_q, pad_k),
    )


def construct_local_mask(
    seqlen_q: int,
    seqlen_k: int,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_token_length: int = 0,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """True where a window hides a key from a query, counted from the bottom right of the valid tokens.

    Args:
        window_size: `(left, right)`; None is open.
        sink_token_length: so many first keys are never hidden on the left.
        key_leftpad: `(batch,)`, keys before the first valid one.

    Returns:
        `(seqlen_q, seqlen_k)`, or `(batch, 1, seqlen_q, seqlen_k)` with a mask or padding.
    """
    diagonal, column, length_k = _positions(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    left, right = window_size
    hidden = torch.zeros((), dtype=torch.bool, device=device)
    if right is not None:
        last = diagonal + right
        hidden = column > (last if left is None else last.clamp(max=length_k))
    if left is not None:
        hidden = hidden | ((column < diagonal - left) & (column >= sink_token_length))
    return hidden


def construct_chunk_mask(
    seqlen_q: int,
    seqlen_k: int,
    attention_chunk: int,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """True where a key lies in another chunk of `attention_chunk` keys than the query; see `construct_local_mask`."""
    diagonal, column, _ = _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    start = diagonal - diagonal % attention_chunk
    return (column < start) | (column >= start + attention_chunk)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    attention_chunk: int = 0,
    sink_token_length: int = 0,
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    upcast: bool = True,
    reorder_ops: bool = False,
    intermediate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the matrix of scores, in fp32 if `upcast`, else in the dtype of the arguments.

    Args:
        q: `(batch, seqlen_q, heads, head_dim)`. k: `(batch, seqlen_k, heads_k, head_dim)`.
        v: `(batch, seqlen_k, heads_k, head_dim_v)`. qv: `(batch, seqlen_q, heads, head_dim_v)`, adds `qv . v` to the
            scores.
        query_padding_mask, key_padding_mask: `(batch, seqlen)`, True for valid tokens.
        attn_bias: added to the scores; broadcasts to `(batch, heads, seqlen_q, seqlen_k)`.
        dropout_mask: `(batch, heads, seqlen_q, seqlen_k)`, True for weights to keep.
        q_descale, k_descale, v_descale: `(batch, heads_k)`, factors.
        learnable_sink: `(heads,)`, a further score for each query, to no value.
        reorder_ops: scale k instead of q, to see how much rounding matters.
        intermediate_dtype: the weights are rounded to it.

    Returns:
        tuple: output `(batch, seqlen_q, heads, head_dim_v)` and weights before dropout `(batch, heads, seqlen_q,
            seqlen_k)`, in
        the dtype of `q`. A query that sees no key gives zeros.
    """
    dtype = q.dtype
    if causal:
        window_size = (window_size[0], 0)
    if upcast:
        q, k, v, qv = q.float(), k.float(), v.float(), None if qv is None else qv.float()
    group = q.shape[2] // k.shape[2]
    if q_descale is not None:
        q, qv = _descale(q, q_descale, group), _descale(qv, q_descale, group)
    k, v = _descale(k, k_descale, 1), _descale(v, v_descale, 1)
    k, v = (repeat(t, "b s h d -> b s (h g) d", g=group) for t in (k, v))

    scale = (q.shape[-1] + (0 if qv is None else v.shape[-1])) ** -0.5
    scores = torch.einsum("bthd,bshd->bhts", *((q, k * scale) if reorder_ops else (q * scale, k)))
    if qv is not None:
        scores = scores + torch.einsum("bthd,bshd->bhts", qv * scale, v)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    rows: dict[str, Any] = {
        "query_padding_mask": query_padding_mask,
        "key_padding_mask": key_padding_mask,
        "key_leftpad": key_leftpad,
        "device": q.device,
    }
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if window_size != (None, None):
        hidden = hidden | construct_local_mask(q.shape[1], k.shape[1], window_size, sink_token_length, **rows)
    if attention_chunk > 0:
        hidden = hidden | construct_chunk_mask(q.shape[1], k.shape[1], attention_chunk, **rows)
    if key_padding_mask is not None:
        hidden = hidden | rearrange(~key_padding_mask, "b s -> b 1 1 s")
    scores = scores.masked_fill(hidden, float("-inf"))
    if attn_bias is not None:
        scores = scores + attn_bias
    if learnable_sink is None:
        attention = scores.softmax(dim=-1)
    else:
        sink = rearrange(learnable_sink, "h -> 1 h 1 1").to(scores.dtype).expand(*scores.shape[:-1], 1)
        attention = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    # Zeros also where softmax gave NaN, for want of any key.
    nothing = hidden | hidden.all(dim=-1, keepdim=True) if hidden.ndim else hidden
    if query_padding_mask is not None:
        nothing = nothing | rearrange(~query_padding_mask, "b s -> b 1 s 1")
    attention = attention.to(v.dtype).masked_fill(nothing, 0.0)

    kept = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(attention.dtype)
    output = torch.einsum("bhts,bshd->bthd", kept, v / (1 - dropout_p))
    return output.to(dtype), attention.to(dtype)


def _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device):
    """`(the key on each query's diagonal, the position of each key, number of valid keys)`, to broadcast."""
    row = torch.arange(seqlen_q, device=device)[:, None]
    column = torch.arange(seqlen_k, device=device)
    if key_leftpad is not None:
        column = column - key_leftpad[:, None, None, None]
        column = column.masked_fill(column < 0, 2**32)
    length_q, length_k = (
        seqlen if mask is None else mask.sum(-1)[:, None, None, None]
        for seqlen, mask in ((seqlen_q, query_padding_mask), (seqlen_k, key_padding_mask))
    )
    return row + length_k - length_q, column, length_k


def _descale(x, descale, group):
    if x is None or descale is None:
        return x
    return (x.float() * repeat(descale, "b h -> b 1 (h g) 1", g=group)).to(x.dtype)
