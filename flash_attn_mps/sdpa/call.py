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


class Signature(NamedTuple):
    """All that dtypes, shapes and strides say about a call, hashable: calls of one signature meet one decision."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    transposed: bool  # is query a view that is not contiguous?
    mask: tuple[torch.Size, torch.dtype, tuple[int, ...]] | None  # shape, dtype, strides
    mask_gradient: bool
    gradient: bool
    dropout: bool
    causal: bool
    gqa: bool


def signature(arguments: Arguments) -> Signature:
    """Of arguments that `obstacles.of_surroundings` and `of_values` found nothing wrong with."""
    query, key, value, mask, dropout_p, is_causal, _, enable_gqa = arguments
    recorded = torch.is_grad_enabled()
    return Signature(
        query.shape,
        key.shape,
        value.shape,
        (query.dtype, key.dtype, value.dtype),
        not query.is_contiguous(),
        None if mask is None else (mask.shape, mask.dtype, mask.stride()),
        mask is not None and recorded and mask.requires_grad,
        recorded and (query.requires_grad or key.requires_grad or value.requires_grad),
        dropout_p > 0,
        is_causal,
        enable_gqa,
    )


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


def describe(given: Signature) -> Call:
    """A signature that `obstacles.of_shapes` found nothing wrong with."""
    query, key, dtype = given.query, given.key, given.dtypes[0]
    kind, varies = "none", ""
    if given.mask is not None:
        shape, mask_dtype, strides = given.mask
        kind = "bool" if mask_dtype == torch.bool else "same" if mask_dtype == dtype else "float32"
        varies = _varying(shape, strides)
    return Call(
        dtype,
        math.prod(query[:-3]),
        query[-3],
        key[-3],
        query[-2],
        key[-2],
        query[-1],
        given.value[-1],
        kind,
        varies,
        given.causal,
        given.dropout,
        given.gradient,
        given.transposed,
    )


def _varying(shape: torch.Size, strides: tuple[int, ...]) -> str:
    axes = zip("kqhb", shape[::-1], strides[::-1], strict=False)
    return "".join(axis for axis, size, stride in axes if size > 1 and stride)[::-1]
