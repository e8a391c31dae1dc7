"""`flash_attn.ops.triton.k_activations`: activations and their derivatives, on tensors instead of triton blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(str, Enum):
    SquaredReLU = "squared_relu"
    GeLU = "gelu"
    GeLUApprox = "gelu_approx"
    LeakyReLU = "leaky_relu"
    ReLU = "relu"


def get_triton_activation_kernel(activation: Activation | None) -> Callable[[Tensor], Tensor] | None:
    """The function that computes an activation; None for None."""
    return _KERNELS[activation][0] if activation else None


def get_triton_activation_bwd_kernel(activation: Activation | None) -> Callable[[Tensor], Tensor] | None:
    """The function that computes the derivative of an activation; None for None."""
    return _KERNELS[activation][1] if activation else None


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def cosh(x: Tensor) -> Tensor:
    return torch.cosh(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def relu_grad(x: Tensor) -> Tensor:
    """One at zero, as upstream has it."""
    return (x >= 0).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x) ** 2` (Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


def squared_relu_grad(x: Tensor) -> Tensor:
    return 2.0 * F.relu(x)


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


def leaky_relu_grad(x: Tensor) -> Tensor:
    return torch.ones_like(x).masked_fill(x < 0, 0.01)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_grad(x: Tensor) -> Tensor:
    cdf = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return cdf + x * pdf


def gelu_approx(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_approx_grad(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")


_KERNELS = {
    Activation.ReLU: (relu, relu_grad),
    Activation.LeakyReLU: (leaky_relu, leaky_relu_grad),
    Activation.GeLU: (gelu, gelu_grad),
    Activation.GeLUApprox: (gelu_approx, gelu_approx_grad),
    Activation.SquaredReLU: (squared_relu, squared_relu_grad),
}
