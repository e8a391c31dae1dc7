"""In a compiled graph: one operator where this package may serve the call, torch's own where it may not.

What is decided when the graph runs, on tensors that are really there, needs no guard and breaks no graph: the operator
`mtlflashattn::scaled_dot_product_attention` makes the same decision as a call outside a graph. It has no gradient, so
calls that need one stay torch's, as do exported programs, which must not need this package.
"""

from __future__ import annotations

import torch

from . import obstacles, serve
from .call import Arguments

# torch finds graphs on disk by what Dynamo saw, which is torch's function with this package and without.
_TAG = "+mtlflashattn.sdpa"


def in_dynamo(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor | None:
    """Traced by Dynamo, in `sdpa.scaled_dot_product_attention`; None where the call is torch's."""
    arguments = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    for tensor in arguments.tensors:
        if type(tensor) not in obstacles.PLAIN:
            return None
    if not obstacles.is_served(query) or torch.compiler.is_exporting() or torch.is_autocast_enabled(query.device.type):
        return None
    return None if arguments.need_gradient else _operator(*arguments)


def in_graph(arguments: Arguments) -> torch.Tensor | None:
    """A call that torch's dispatcher makes while a graph is captured, on tensors without data; None: it is torch's.

    Dynamo makes one to learn the shape, before it asks for a graph on disk, and AOTAutograd others, of which it records
    the operators.
    """
    if torch._guards.CompileContext.current_compile_id() is None:
        return None  # torch.compile does not work in this thread
    functional = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    if functional is None:
        if _TAG not in torch.compiler.config.cache_key_tag:  # a setting of this thread
            torch.compiler.config.cache_key_tag += _TAG
        return None
    if functional.export or not serve.usual_backends() or arguments.need_gradient:
        return None
    return _operator(*arguments)


def check() -> None:
    """Raises AttributeError where this torch does not have what `in_graph` asks for."""
    for owner, name in (
        (torch._guards.CompileContext, "current_compile_id"),
        (torch._C, "_get_dispatch_mode"),
        (torch._C._TorchDispatchModeKey, "FUNCTIONAL"),
        (torch.compiler.config, "cache_key_tag"),
    ):
        getattr(owner, name)


def end() -> None:
    """Graphs that this thread compiles from now on are torch's own."""
    torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(_TAG, "")


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, "
    "bool enable_gqa) -> Tensor"
)


@torch.library.custom_op("mtlflashattn::scaled_dot_product_attention", mutates_args=(), schema=_SCHEMA)
def _operator(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    arguments = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = serve.result(arguments)
    if out is None:
        out = serve.torchs(*arguments[:6], scale=scale, enable_gqa=enable_gqa)
    return out.contiguous()  # the layout that the graph was made for


@_operator.register_fake
def _(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    leading = torch.broadcast_shapes(query.shape[:-2], *([] if enable_gqa else [key.shape[:-2], value.shape[:-2]]))
    return query.new_empty(*leading, query.shape[-2], value.shape[-1])
