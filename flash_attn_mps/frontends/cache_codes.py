"""Quantised caches: what their arguments have to be. See `quantised` for the formats."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks, quantised
from .cache_call import CacheCall

_DESCALED = ("fa3", "fa3_private")  # callers that have descales


def may_be_quantised(call: CacheCall) -> bool:
    """Is there anything for `kv_dtype` to look at? Asked on every call."""
    descales = call.k_descale is not None or call.v_descale is not None
    return descales or getattr(call.k_cache, "dtype", None) in quantised.FORMATS


def kv_dtype(call: CacheCall) -> torch.dtype | None:
    """The dtype of both caches if they are quantised; None if not.

    Raises NotImplementedError, with the name of the argument, for descales of a cache that is not quantised, and for
    `qv` with one that is.
    """
    dtype: Any = getattr(call.k_cache, "dtype", None)
    if dtype in quantised.FORMATS and call.caller not in _DESCALED:
        accepted = "the dtype of q; quantised caches belong to flash_attn_interface.flash_attn_with_kvcache"
        raise checks.malformed(call.names["k_cache"], f"dtype {dtype}", accepted)
    if dtype not in quantised.FORMATS:
        for name, value in (("k_descale", call.k_descale), ("v_descale", call.v_descale)):
            if value is not None:
                formats = ", ".join(map(str, quantised.FORMATS))
                raise checks.unsupported(
                    name, value, f"None for a {call.names['k_cache']} of {dtype}; or one of {formats}"
                )
        return None
    if call.qv is not None:
        raise checks.unsupported("qv", call.qv, f"None with a quantised {call.names['k_cache']}, of {dtype}")
    q, k_cache = call.q, call.k_cache
    on_device = isinstance(q, torch.Tensor) and isinstance(k_cache, torch.Tensor) and q.device == k_cache.device
    if dtype.is_floating_point and not on_device:
        accepted = (
            "a tensor where the queries are; on MPS, in a torch without float8 there, torch.uint8 with the bytes of"
        )
        accepted += " torch.float8_e4m3fn, or torch.int8"
        raise checks.malformed(call.names["k_cache"], k_cache, accepted)
    return dtype


def check_descales(call: CacheCall, batch: int) -> None:
    shape = (batch, call.k_cache.shape[-2])
    for name, value in (("k_descale", call.k_descale), ("v_descale", call.v_descale)):
        if value is not None:
            checks.of_shape(
                value, name, shape, torch.float32, call.q, "one number for each sequence and head of k_cache"
            )
