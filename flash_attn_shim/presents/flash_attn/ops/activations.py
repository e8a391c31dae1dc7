"""`flash_attn.ops.activations`: activations that keep only their input for the backward pass, and their derivatives.

A name that ends in `_fwd` is a plain function, one in `_bwd` or `_back` its vector-Jacobian product, and one in
`Function` binds the two for autograd. GELU is the tanh approximation throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """GELU of `y + bias`, in the dtype of `y`."""
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `bias_gelu` for `y` `(B, D)` and `bias` `(D,)`, given that of its result."""
    x = y + bias
    grad = gelu_bwd(g.to(x.dtype), x)
    return grad.to(y.dtype), grad.sum(dim=0, dtype=bias.dtype)


class GeLUFunction(torch.autograd.Function):
    """`bias_gelu` for `input` `(..., D)`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, bias = ctx.saved_tensors
        grad_input, grad_bias = bias_gelu_back(grad_output.flatten(0, -2), input.flatten(0, -2), bias)
        return grad_input.reshape(input.shape), grad_bias


bias_gelu_impl = GeLUFunction.apply


def gelu_fwd(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(g.to(x.dtype), x, approximate="tanh")


class FastGeLUFunction(torch.autograd.Function):
    """`gelu_fwd`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (input,) = ctx.saved_tensors
        return gelu_bwd(grad_output, input)


fast_gelu_impl = FastGeLUFunction.apply


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The derivative at zero is one, as upstream has it."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """`relu(x) ** 2` (Primer, arXiv:2109.08668)."""
    r = F.relu(x)
    return (r * r).to(x.dtype)


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return (2.0 * g * F.relu(x)).to(x.dtype)


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """`silu(x) * y`."""
    return F.silu(x) * y


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu_fwd` for `x` and `y`, given that of its result."""
    dy = F.silu(x) * g
    if torch.is_grad_enabled():  # silu_backward, which does this in one pass, has no derivative itself
        s = torch.sigmoid(x)
        return g * y * s * (1.0 + x * (1.0 - s)), dy
    return torch.ops.aten.silu_backward(g * y, x), dy


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu_fwd`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return swiglu_bwd(x, y, dout)


swiglu = SwiGLUFunction.apply
