"""Attention against a key-value cache as operators of `torch.library`, for graphs: see `graph/attention_op.py`.

The whole call is one operator, not the attention alone: where the new keys go is a matter of values, which a graph
does not have. `flash_attn_with_kvcache` reads the caches, `flash_attn_with_kvcache_append` writes them too: one
operator for both would have graphs copy caches that nobody writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op

from .. import checks
from ..describe import CallOptions
from ..problem import Result
from .attention_op import NAMESPACE, contiguous

_TENSORS = (
    "k",
    "v",
    "qv",
    "rotary_cos",
    "rotary_sin",
    "rotary_seqlens",
    "cache_batch_idx",
    "cache_leftpad",
    "block_table",
    "cu_seqlens_q",
    "cu_seqlens_k_new",
)
_NUMBERS = ("cache_seqlens", "max_seqlen_q")  # integers or tensors
_SCHEMA = ", ".join(
    (
        "(Tensor q, Tensor{} k_cache, Tensor{} v_cache",
        "float? softmax_scale, Tensor? softmax_scale_tensor, bool causal, SymInt window_left, SymInt window_right",
        "float softcap, Tensor? alibi_slopes, bool want_lse, SymInt attention_chunk",
        "bool rotary_interleaved, str block_table_name",
        *(f"SymInt? {name}, Tensor? {name}_tensor" for name in _NUMBERS),
        *(f"Tensor? {name}" for name in _TENSORS),
    )
)


def register(attend: Callable[..., Result]) -> Callable[..., Result]:
    """The operators whose kernel is `attend`, as a function with the same arguments: `kvcache.attention`'s."""

    def kernel(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k_cache, v_cache, options, named = _call(arguments)
        with torch.no_grad():
            result = attend(q, k_cache, v_cache, options, **named)
            lse = result.lse if options.want_lse else q.new_empty(0, dtype=torch.float32)
            return contiguous(result.out), contiguous(lse)

    def fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, _, v_cache, options, named = _call(arguments)
        heads_first = (0, 2, 1) if named["cu_seqlens_q"] is None else (1, 0)
        lse_shape = tuple(q.shape[i] for i in heads_first) if options.want_lse else (0,)
        return q.new_empty((*q.shape[:-1], v_cache.shape[-1])), q.new_empty(lse_shape, dtype=torch.float32)

    def define(name: str, written: tuple[str, ...], schema: str) -> Callable[..., Any]:
        op = custom_op(f"{NAMESPACE}::{name}", kernel, mutates_args=written, schema=f"{schema}) -> (Tensor, Tensor)")
        op.register_fake(fake)
        return op

    reads = define("flash_attn_with_kvcache", (), _SCHEMA.format("", ""))
    writes = define("flash_attn_with_kvcache_append", ("k_cache", "v_cache"), _SCHEMA.format("(a!)", "(b!)"))

    def captured(q: Any, k_cache: Any, v_cache: Any, options: CallOptions, **named: Any) -> Result:
        op = reads if named["k"] is None and named["v"] is None else writes
        out, lse = op(*_flat(q, k_cache, v_cache, options, named))
        return Result(out, lse if options.want_lse else None)

    return captured


def _flat(q: Any, k_cache: Any, v_cache: Any, options: CallOptions, named: dict[str, Any]) -> list[Any]:
    """The arguments in the order of the schema; numbers as plain ones."""
    scale = options.softmax_scale
    if scale is not None:
        scale = checks.softmax_scale(scale, 1, q)
    arguments = [q, k_cache, v_cache, *_either(scale), bool(options.causal)]
    arguments += checks.window(options.window_size, False)
    arguments += [checks.softcap(options.softcap), options.alibi_slopes, bool(options.want_lse)]
    arguments += [checks.attention_chunk(options.attention_chunk), bool(named["rotary_interleaved"])]
    arguments.append(named["block_table_name"])
    for name in _NUMBERS:
        value = named[name]
        if value is not None and not isinstance(value, torch.Tensor):
            value = checks.integer(value, name, "None, an integer or an integer tensor")
        arguments += _either(value)
    return arguments + [named[name] for name in _TENSORS]


def _either(value: Any) -> tuple[Any, Any]:
    return (None, value) if isinstance(value, torch.Tensor) else (value, None)


def _call(arguments: tuple[Any, ...]) -> tuple[Any, Any, Any, CallOptions, dict[str, Any]]:
    """`(q, k_cache, v_cache, options, the arguments by name)`."""
    q, k_cache, v_cache, scale, scale_tensor, causal, left, right, softcap, slopes, want_lse, chunk, *rest = arguments
    scale = scale if scale_tensor is None else scale_tensor
    options = CallOptions(scale, causal, (left, right), softcap, slopes, want_lse=want_lse, attention_chunk=chunk)
    named = dict(zip(("rotary_interleaved", "block_table_name"), rest, strict=False))
    numbers, tensors = rest[2 : 2 + 2 * len(_NUMBERS)], rest[2 + 2 * len(_NUMBERS) :]
    for name, number, tensor in zip(_NUMBERS, numbers[::2], numbers[1::2], strict=True):
        named[name] = number if tensor is None else tensor
    named.update(zip(_TENSORS, tensors, strict=True))
    return q, k_cache, v_cache, options, named
