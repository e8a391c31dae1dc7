"""What decides about a call of `scaled_dot_product_attention`, as plain values: no tensor is among them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class Arguments(NamedTuple):
    """The arguments of `torch.nn.functional.scaled_dot_product_attention`, in its order and with its defaults."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False

    @property
    def tensors(self) -> tuple[Any, ...]:
        """query, key, value and, if there is one, the mask."""
        return self[:3] if self.attn_mask is None else self[:4]


def bind(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Arguments:
    """Sort out positional and keyword arguments as torch does. Raises TypeError."""
    return Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class Call(NamedTuple):
    """One call. Lengths are in tokens, `batch` is the product of all leading dimensions."""

    dtype: torch.dtype
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    mask: str = "none"  # or "bool", "same" (the dtype of q), "float32"
    mask_varies: str = ""  # along which of "bhqk" the mask is not broadcast
    causal: bool = False
    dropout: bool = False
    gradient: bool = False
    transposed: bool = False  # is q a view that is not contiguous?

    @property
    def half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def scores(self) -> int:
        """Elements of the score matrix."""
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k


def describe(arguments: Arguments) -> Call:
    """Arguments that `obstacles.obstacle` found nothing wrong with."""
    query, key, value, mask, dropout_p, is_causal, _, _ = arguments
    kind = "none"
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "same" if mask.dtype == query.dtype else "float32"
    return Call(
        query.dtype,
        math.prod(query.shape[:-3]),
        query.shape[-3],
        key.shape[-3],
        query.shape[-2],
        key.shape[-2],
        query.shape[-1],
        value.shape[-1],
        kind,
        "" if mask is None else _varies(mask),
        is_causal,
        dropout_p > 0,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments.tensors),
        not query.is_contiguous(),
    )


def _varies(mask: torch.Tensor) -> str:
    axes = "b" * max(1, mask.dim() - 3) + "hqk"
    sizes, strides = mask.shape[::-1], mask.stride()[::-1]
    varying = {axis for axis, size, stride in zip(axes[::-1], sizes, strides, strict=False) if size > 1 and stride}
    return "".join(axis for axis in "bhqk" if axis in varying)
