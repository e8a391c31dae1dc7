"""Under torch.compile: one operator in the graph where this package may serve the call, torch's own where it may not.

What is decided when the graph runs, on tensors that are really there, needs no guard and breaks no graph: the operator
`mtlflashattn::scaled_dot_product_attention` makes the same decision as a call outside a graph. It has no gradient, so
calls that need one stay torch's, as do exported programs, which must not need this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import obstacles
from .call import bind

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7 and later


def attention(torchs: Callable[..., torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Traced by Dynamo: what it can evaluate while it traces decides."""
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if obstacles.is_causal_bias(mask):
        return obstacles.with_causal_bias(mask, args, kwargs)
    query = args[0] if args else kwargs.get("query")
    if type(query) not in obstacles.PLAIN or not obstacles.is_served(query):
        return torchs(*args, **kwargs)
    if _is_exporting() or torch.is_autocast_enabled(query.device.type):
        return torchs(*args, **kwargs)
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = bind(*args, **kwargs)
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    for tensor in tensors:
        if type(tensor) not in obstacles.PLAIN or (torch.is_grad_enabled() and tensor.requires_grad):
            return torchs(*args, **kwargs)
    return _operator(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, "
    "bool enable_gqa) -> Tensor"
)


@torch.library.custom_op("mtlflashattn::scaled_dot_product_attention", mutates_args=(), schema=_SCHEMA)
def _operator(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    from . import patch

    out = patch.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.contiguous()  # the layout that the graph was made for


@_operator.register_fake
def _(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    leading = torch.broadcast_shapes(query.shape[:-2], *([] if enable_gqa else [key.shape[:-2], value.shape[:-2]]))
    return query.new_empty(*leading, query.shape[-2], value.shape[-1])
