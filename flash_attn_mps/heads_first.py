"""`flash_attention` on `(batch, heads, seqlen, head_dim)`: the function of the older packages for Macs."""

from __future__ import annotations

import torch

from . import checks, dispatch
from .sdpa import attention
from .sdpa.call import Arguments


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
        checks.tensor(tensor, name, dims, query)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, is_causal)
    arguments = Arguments(query, key, value, attn_mask, dropout_p, bool(is_causal), scale, True)
    return attention.as_called(dispatch.attention(attention.problem(arguments)).out, query)


def _check_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> None:
    shape = (*query.shape[:-1], key.shape[-2])
    if not isinstance(mask, torch.Tensor):
        raise checks.malformed("attn_mask", mask, f"a tensor that broadcasts to {shape}")
    if mask.dtype == torch.bool:
        accepted = "an additive mask, -inf where hidden; or a boolean one in sdpa.scaled_dot_product_attention"
        raise checks.unsupported("attn_mask", "a boolean mask, whose True is ambiguous", accepted)
    if mask.requires_grad and torch.is_grad_enabled():
        raise checks.unsupported("attn_mask", "a tensor that requires grad", "a mask without gradient: pass .detach()")
    if mask.dtype not in (query.dtype, torch.float32) or mask.device != query.device:
        raise checks.malformed("attn_mask", mask, f"{query.dtype} or torch.float32, on {query.device}")
    if is_causal:
        raise checks.malformed("attn_mask", mask, "None with is_causal, or a mask that says it all")
    if mask.dim() > 4 or any(n not in (1, m) for n, m in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise checks.malformed("attn_mask", mask, f"a shape that broadcasts to {shape}")
