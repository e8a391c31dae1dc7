"""`flash_attn.bert_padding`: from padded batches `(batch, seqlen, ...)` to packed tokens `(total, ...)` and back.

`rearrange` and `repeat` are einops' own: callers import them from here.
"""

from __future__ import annotations

from typing import Any

import flash_attn_shim.needs_torch  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from flash_attn_shim.guests.dialects import of_four_values as _of_four_values
from flash_attn_shim.guests.presented import present as _present

_present(__name__)

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


class IndexFirstAxis(torch.autograd.Function):
    """`input[indices]` along the first axis; rows taken more than once get the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Any:
        ctx.save_for_backward(indices)
        ctx.first_axis_dim = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        grad_input = grad_output.new_zeros(ctx.first_axis_dim, *grad_output.shape[1:])
        return grad_input.index_add(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """Zeros of `first_axis_dim` rows, with `values` at the rows `indices`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Any:
        ctx.save_for_backward(indices)
        return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy_(0, indices.long(), values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """`(input[indices], input)`: for a layer on some rows and a residual branch around it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Any:
        ctx.save_for_backward(indices)
        # Detached: a result that is a view of an argument could not be added to in place.
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Any, grad_residual: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


@_of_four_values
def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask selects.

    Args:
        hidden_states: `(batch, seqlen, ...)`.
        attention_mask: `(batch, seqlen)`, bool or int, 1 for a valid token.
        unused_mask: `(batch, seqlen)`, 1 for a token that gets a place in the result but is not valid.

    Returns:
        tuple: `(hidden_states, indices, cu_seqlens, max_seqlen, seqused)`: the packed tokens `(total, ...)`; their
            indices in the flattened
        batch `(total,)`, int64; bounds `(batch + 1,)`, int32; the longest sequence, an int; and the valid tokens of
        each sequence `(batch,)`, int32. Bounds and longest count both masks. Where the calling code takes four values,
        as before flash-attn 2.7, the last one is left out.
    """
    placed = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqlens = placed.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    return *_pack(hidden_states, placed, seqlens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that each hold several sequences one after the other.

    Args:
        hidden_states: `(batch, seqlen, ...)`.
        attention_mask_in_length: `(batch, seqlen)`, int. The nonzero numbers of a row are the lengths of its
            sequences, in order: `[2, 3, 0, 0, 0, 0]` is a row of six tokens, of which two belong to a first sequence,
                three to a second one, and one is padding.

    Returns:
        tuple: `(hidden_states, indices, cu_seqlens, max_seqlen)` as `unpad_input` gives them, each sequence for itself.
    """
    seqlen = attention_mask_in_length.shape[-1]
    used = attention_mask_in_length.sum(dim=-1, keepdim=True)
    placed = torch.arange(seqlen, device=used.device) < used
    seqlens = attention_mask_in_length[attention_mask_in_length != 0]
    return _pack(hidden_states, placed, seqlens)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: tokens `(total, ...)` to `(batch, seqlen, ...)`, zeros where `indices` does not point."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _pack(hidden_states, placed, seqlens):
    # The number of tokens is the shape of the result and max_seqlen is promised as an int: these two wait for the
    # device, nothing else does.
    indices = placed.flatten().nonzero().flatten()
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, seqlens.max().item()
