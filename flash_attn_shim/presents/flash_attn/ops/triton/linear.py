"""`flash_attn.ops.triton.linear`, without triton: the two halves of a linear layer with an activation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flash_attn.ops.triton import k_activations

_ACTIVATIONS = ("id", "gelu", "gelu_approx", "squared_relu")


def triton_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "id",
    save_act_input: bool = False,
) -> Tensor | Any:
    """`activation(x @ weight.T + bias)`, with `save_act_input` the tuple of that and the input of the activation.

    Args:
        x: `(..., in_features)`. weight: `(out_features, in_features)`. bias: `(out_features,)`.
        activation: "id", "gelu", "gelu_approx" or "squared_relu".
    """
    _check(activation)
    act_input = F.linear(x, weight, bias)
    out = act_input if activation == "id" else getattr(k_activations, activation)(act_input)
    return (out, act_input) if save_act_input else out


def triton_dgrad_act(
    grad_output: Tensor,
    weight: Tensor,
    activation: str = "id",
    act_input: Tensor | None = None,
) -> Tensor:
    """Gradient for the input of an activation before a linear layer: `grad_output @ weight * act'(act_input)`."""
    _check(activation)
    grad = grad_output @ weight
    if activation == "id":
        return grad
    if act_input is None:
        raise ValueError(f"act_input must be given with activation {activation!r}, got None")
    return grad * getattr(k_activations, f"{activation}_grad")(act_input)


def _check(activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
