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

    @property
    def need_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)


class Call(NamedTuple):
    """All that dtypes, shapes and strides say about a call, hashable: calls that are equal meet one decision.

    The properties hold for a call that `obstacles.of_shapes` found nothing wrong with; lengths are in tokens.
    """

    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    transposed: bool = False  # is query a view that is not contiguous?
    attn_mask: tuple[torch.Size, torch.dtype, tuple[int, ...]] | None = None  # shape, dtype, strides
    gradient: bool = False  # is one needed, the mask's counting too?
    dropout: bool = False
    causal: bool = False
    gqa: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def batch(self) -> int:
        """The product of all leading dimensions."""
        return math.prod(self.query[:-3])

    @property
    def heads(self) -> int:
        return self.query[-3]

    @property
    def seqlen_q(self) -> int:
        return self.query[-2]

    @property
    def seqlen_k(self) -> int:
        return self.key[-2]

    @property
    def head_dim(self) -> int:
        return self.query[-1]

    @property
    def head_dim_v(self) -> int:
        return self.value[-1]

    @property
    def half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def scores(self) -> int:
        """Elements of the score matrix."""
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k

    @property
    def mask(self) -> str:
        """ "none", "bool", "same" (the dtype of query) or "float32"."""
        if self.attn_mask is None:
            return "none"
        return "bool" if self.attn_mask[1] == torch.bool else "same" if self.attn_mask[1] == self.dtype else "float32"

    @property
    def mask_varies(self) -> str:
        """Along which of "bhqk" the mask is not broadcast."""
        if self.attn_mask is None:
            return ""
        shape, _, strides = self.attn_mask
        axes = zip("kqhb", shape[::-1], strides[::-1], strict=False)
        return "".join(axis for axis, size, stride in axes if size > 1 and stride)[::-1]


def call_of(arguments: Arguments) -> Call:
    """Of arguments that `obstacles.of_surroundings` and `of_values` found nothing wrong with."""
    query, key, value, mask, dropout_p, is_causal, _, enable_gqa = arguments
    return Call(
        query.shape,
        key.shape,
        value.shape,
        (query.dtype, key.dtype, value.dtype),
        not query.is_contiguous(),
        None if mask is None else (mask.shape, mask.dtype, mask.stride()),
        arguments.need_gradient,
        dropout_p > 0,
        is_causal,
        enable_gqa,
    )
