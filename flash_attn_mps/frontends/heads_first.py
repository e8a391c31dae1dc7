"""`flash_attention` on `(batch, heads, seqlen, head_dim)`: the function of the older packages for Macs."""

from __future__ import annotations

import torch

from .. import checks, dispatch
from ..sdpa import attention
from ..sdpa.call import Arguments


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention by this package, whatever torch could do. Returns `(batch, heads, seqlen_q, head_dim of value)`.

    query `(batch, heads, seqlen_q, head_dim)`, key and value `(batch, heads_k, seqlen_k, head_dim)`, where heads_k
    divides heads; float16, bfloat16 or float32. `is_causal`: query i sees the keys up to i, as in torch. `attn_mask`:
    added to the scores, of any shape that broadcasts to `(batch, heads, seqlen_q, seqlen_k)`, in the dtype of query
    or float32; -inf hides. Differentiable, but for the mask.

    Errors: ValueError for a malformed call; NotImplementedError for a boolean mask, of which True means "hidden" to
    some of these packages and "seen" to torch, and for a mask that requires a gradient.
    """
    dims = "batch, heads, seqlen, head_dim"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(tensor, name, dims)
    if getattr(attn_mask, "dtype", None) == torch.bool:
        accepted = "an additive mask, -inf where hidden; or a boolean one in sdpa.scaled_dot_product_attention"
        raise checks.unsupported("attn_mask", "a boolean mask, whose True is ambiguous", accepted)
    if attn_mask is not None and is_causal:
        raise checks.malformed("attn_mask", attn_mask, "None with is_causal, or a mask that says it all")
    if scale is not None:
        scale = checks.number(scale, "scale", "None or a finite number")
    arguments = Arguments(query, key, value, attn_mask, dropout_p, bool(is_causal), scale, True)
    return attention.as_called(dispatch.attention(attention.problem(arguments)).out, query)
