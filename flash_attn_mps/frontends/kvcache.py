"""Attention against a key-value cache, shared by FlashAttention 2 and 3: at once, or in a graph when that runs."""

from __future__ import annotations

from typing import Any

import torch

from ..capture import capturing
from ..graph import attention_op, kvcache_op
from ..problem import Result
from .cache_call import CacheCall
from .cache_repeat import computed


def attention(call: CacheCall) -> Result:
    """Append the new keys and values to the caches, rotate what is to be rotated, and attend.

    Not differentiable: the result's backward raises `NotImplementedError`.
    """
    if not torch.is_grad_enabled():
        return _computed(call)
    with torch.no_grad():
        result = _computed(call)
    for tensor in (call.q, call.k_cache, call.v_cache, call.k, call.v, call.qv):
        if tensor is not None and tensor.requires_grad:
            result.out = _NoBackward.apply(result.out, tensor)
            break
    return result


def _computed(call: CacheCall) -> Result:
    return kvcache_op.captured(call) if capturing(call.q) else computed(call)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(anchor)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        # An operator, because a graph is made of the backward pass too, whether anybody runs it or not.
        reason = "flash_attn_with_kvcache has no backward pass: use flash_attn_func to train"
        return None, attention_op.no_gradient(dout, *ctx.saved_tensors, reason)
