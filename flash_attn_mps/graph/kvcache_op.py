"""Attention against a key-value cache as operators of `torch.library`, for graphs: see `graph/attention_op.py`.

The whole call is one operator, not the attention alone: where the new keys go is a matter of values, which a graph
does not have. `flash_attn_with_kvcache` reads the caches, `flash_attn_with_kvcache_append` writes them too: one
operator for both would have graphs copy caches that nobody writes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.library import custom_op

from .. import checks
from ..describe import CallOptions
from ..frontends.cache_call import CacheCall
from ..frontends.cache_repeat import computed
from ..problem import Result
from .attention_op import NAMESPACE, contiguous
from .schema import fields_of, flatten, schema_of, unflatten

_CALL, _OPTIONS = fields_of(CacheCall, "options"), fields_of(CallOptions)
_READS = f"({schema_of(_CALL + _OPTIONS)}) -> (Tensor, Tensor)"
_WRITES = _READS.replace("Tensor k_cache", "Tensor(a!) k_cache").replace("Tensor v_cache", "Tensor(b!) v_cache")


@custom_op(f"{NAMESPACE}::flash_attn_with_kvcache", mutates_args=(), schema=_READS)
def _read(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _computed(*arguments)


@custom_op(f"{NAMESPACE}::flash_attn_with_kvcache_append", mutates_args=("k_cache", "v_cache"), schema=_WRITES)
def _append(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _computed(*arguments)


def _computed(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(arguments)
    with torch.no_grad():
        result = computed(call)
        lse = result.lse if call.options.want_lse else None
        return contiguous(result.out), call.q.new_empty(0, dtype=torch.float32) if lse is None else contiguous(lse)


@_read.register_fake
@_append.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(arguments)
    q, heads_first = call.q, (0, 2, 1) if call.cu_seqlens_q is None else (1, 0)
    lse_shape = tuple(q.shape[i] for i in heads_first) if call.options.want_lse else (0,)
    return q.new_empty((*q.shape[:-1], call.v_cache.shape[-1])), q.new_empty(lse_shape, dtype=torch.float32)


def captured(call: CacheCall) -> Result:
    """The result of `call` in a graph: that of the operator."""
    call = _plain(call)
    op = _read if call.k is None and call.v is None else _append
    out, lse = op(*flatten(_CALL, call), *flatten(_OPTIONS, call.options))
    return Result(out, lse if call.options.want_lse else None)


def _plain(call: CacheCall) -> CacheCall:
    """`call` with plain numbers, as an operator takes them."""
    options, scale = call.options, call.options.softmax_scale
    options = dataclasses.replace(
        options,
        softmax_scale=None if scale is None else checks.softmax_scale(scale, 1, call.q),
        causal=checks.flag(options.causal, "causal"),
        window_size=checks.window(options.window_size, False),
        softcap=checks.softcap(options.softcap),
        attention_chunk=checks.attention_chunk(options.attention_chunk),
        num_splits=checks.integer(options.num_splits, "num_splits", "an integer"),
    )
    return dataclasses.replace(
        call,
        options=options,
        cache_seqlens=_number(call.cache_seqlens, "cache_seqlens"),
        max_seqlen_q=_number(call.max_seqlen_q, "max_seqlen_q"),
    )


def _number(value: Any, name: str) -> int | torch.Tensor | None:
    if value is None or isinstance(value, torch.Tensor):
        return value
    return checks.integer(value, name, "None, an integer or an integer tensor")


def _call(arguments: tuple[Any, ...]) -> CacheCall:
    values = iter(arguments)
    fields, options = unflatten(_CALL, values), unflatten(_OPTIONS, values)
    options["window_size"] = tuple(options["window_size"])  # an operator gets a list
    return CacheCall(**fields, options=CallOptions(**options))
