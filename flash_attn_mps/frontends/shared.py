"""What the front ends share: the parts of a packed tensor on the way in, upstream's tuples on the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..problem import AttentionProblem

#: The caller's names of q, k and v where they come in one tensor.
QKV = {"q": "qkv", "k": "qkv", "v": "qkv"}
KV = {"k": "kv", "v": "kv"}


def unpack(packed: Any, name: str, dims: str, parts: int) -> tuple[Tensor, ...]:
    """Views of the parts of a packed tensor, along its third dimension from the end."""
    checks.tensor(packed, name, dims)
    if packed.shape[-3] != parts:
        raise checks.malformed(name, packed, f"a tensor ({dims})")
    return packed.unbind(-3)


def finish(p: AttentionProblem) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute `p`. Returns the output, or with `want_lse` the tuple of FlashAttention 2's `return_attn_probs`."""
    result = dispatch.attention(p)
    if not p.want_lse:
        return result.out
    assert result.lse is not None
    probs = result.out.new_empty(0) if result.probs is None else result.probs
    return result.out, result.lse, probs


def window_of(window_size_left: Any, window_size_right: Any) -> tuple[int, int]:
    """`window_size` of the private functions, to which its sides are two arguments."""
    accepted = "an integer, -1 for an open side"
    left = checks.integer(window_size_left, "window_size_left", accepted)
    return left, checks.integer(window_size_right, "window_size_right", accepted)


def accumulators(out: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 3's `out_accum` and `softmax_lse_accum`; empty, since keys are never split here."""
    return out.new_empty(0, dtype=torch.float32), out.new_empty(0, dtype=torch.float32)


def reject_descales(**descales: Any) -> None:
    for name, value in descales.items():
        if value is not None:
            raise checks.unsupported(
                name, checks.show(value), "None: only flash_attn_with_kvcache takes k_descale and v_descale"
            )
