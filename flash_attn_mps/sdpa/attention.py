"""`scaled_dot_product_attention` as an `AttentionProblem`: torch's semantics, in views."""

from __future__ import annotations

import torch

from ..describe import CallOptions, dense
from ..problem import AttentionProblem, with_mask
from .call import Arguments

_NAMES = {"q": "query", "k": "key", "v": "value", "softmax_scale": "scale"}


def problem(arguments: Arguments) -> AttentionProblem:
    """Arguments that ``obstacles`` found nothing wrong with.

    torch's causal mask is aligned to the top left: query i sees the keys up to i.
    """
    query, key, value, mask, dropout_p, is_causal, scale, _ = arguments
    leading, (seqlen_q, seqlen_k) = query.shape[:-3], (query.shape[-2], key.shape[-2])
    q, k, v = (_rows_first(tensor, leading) for tensor in (query, key, value))
    right = -1
    if is_causal:
        k, v = k[:, :seqlen_q], v[:, :seqlen_q]  # no query sees a key beyond
        right = max(0, seqlen_q - seqlen_k)  # windows are counted from the bottom right
    options = CallOptions(softmax_scale=scale, window_size=(-1, right), dropout_p=float(dropout_p))
    p = dense(q, k, v, options, _NAMES)
    return p if mask is None else with_mask(p, mask)


def as_called(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`(batch, seqlen_q, heads, head_dim)` in the shape of `query`: a view."""
    out = out.transpose(1, 2)
    return out if query.dim() == 4 else out.unflatten(0, query.shape[:-3]) if query.dim() > 4 else out[0]


def _rows_first(tensor: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """`(..., heads, seqlen, head_dim)` as `(batch, seqlen, heads, head_dim)`, expanded to `leading`."""
    tensor = tensor.expand(*leading, -1, -1, -1)
    tensor = tensor[None] if not leading else tensor.flatten(0, -4)
    return tensor.transpose(1, 2)
