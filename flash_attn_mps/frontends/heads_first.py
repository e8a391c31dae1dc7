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
    """Attention by this package, whatever torch could do: `softmax(query key^T * scale + attn_mask) value` per head.

    Masks are torch's: the causal one is aligned to the top left, unlike that of the `flash_attn` functions. An x is a
    key (column) that a query (row) sees:

        seqlen_q=2, seqlen_k=5    seqlen_q=5, seqlen_k=2
        is_causal=True            is_causal=True
        x . . . .                 x .
        x x . . .                 x x
                                  x x
                                  x x
                                  x x

    Args:
        query: `(batch, heads, seqlen_q, head_dim)`; float16, bfloat16 or float32, head_dim up to 512.
        key: `(batch, heads_k, seqlen_k, head_dim)`, dtype and device of query; heads_k divides heads.
        value: `(batch, heads_k, seqlen_k, head_dim_v)`, like key; head_dim_v may differ from head_dim.
        is_causal: hide what comes later: query i sees key j if `j <= i`.
        scale: factor of the scores, a number; None for `1 / sqrt(head_dim)`.
        attn_mask: added to the scores, in the dtype of query or float32; any shape that broadcasts to `(batch, heads,
            seqlen_q, seqlen_k)`. -inf hides. Differentiable: the gradient of a bias that is not expanded, say
            `(heads, seqlen_q, seqlen_k)`, needs no more memory than the bias. None with `is_causal`.
        dropout_p: probability in [0, 1) that an attention weight is dropped; 0.0 to evaluate.

    Returns:
        `(batch, heads, seqlen_q, head_dim_v)`, dtype of query. A query that sees no key gives zeros.

    Raises:
        ValueError: a malformed argument. The message says which, what came and what would be accepted.
        NotImplementedError: a boolean mask, of which True means "hidden" to some of these packages and "seen" to torch;
            a call that nothing here computes.

    Example:
        >>> import torch
        >>> from flash_attn_mps import flash_attention
        >>> device = "mps" if torch.backends.mps.is_available() else "cpu"
        >>> query, key, value = torch.randn(3, 2, 8, 128, 64, device=device)
        >>> flash_attention(query, key, value, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    dims = "batch, heads, seqlen, head_dim"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(tensor, name, dims)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] not in (1, query.shape[0]):
            raise checks.malformed(name, tensor, f"a batch of {query.shape[0]}, that of query, or of 1")
    is_causal = checks.flag(is_causal, "is_causal")
    if getattr(attn_mask, "dtype", None) == torch.bool:
        accepted = "an additive mask, -inf where hidden; or a boolean one in sdpa.scaled_dot_product_attention"
        raise checks.unsupported("attn_mask", "a boolean mask, whose True is ambiguous", accepted)
    if attn_mask is not None and is_causal:
        raise checks.malformed("attn_mask", checks.show(attn_mask), "None with is_causal, or a mask that says it all")
    arguments = Arguments(query, key, value, attn_mask, checks.dropout_p(dropout_p), is_causal, scale, True)
    return attention.as_called(dispatch.attention(attention.problem(arguments)).out, query)
