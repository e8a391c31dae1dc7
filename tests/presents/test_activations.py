"""`ops.activations` and `ops.triton.k_activations` against the formulas in fp64."""

import math

import pytest
import torch

from flash_attn.ops import activations
from flash_attn.ops.triton import k_activations
from flash_attn.ops.triton.k_activations import Activation

from .reference import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu_times(x, y):
    return x / (1 + torch.exp(-x)) * y


def squared_relu(x):
    return x.clamp(min=0) ** 2


def leaf(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "definition", "shapes"),
    [
        (activations.swiglu, silu_times, [(3, 4, 8), (3, 4, 8)]),
        (activations.bias_gelu_impl, lambda x, b: gelu_tanh(x + b), [(3, 4, 8), (8,)]),
        (activations.bias_gelu_impl, lambda x, b: gelu_tanh(x + b), [(5, 8), (8,)]),
        (activations.fast_gelu_impl, gelu_tanh, [(3, 4, 8)]),
        (activations.bias_gelu, lambda x, b: gelu_tanh(x + b), [(5, 8), (8,)]),
        (activations.gelu_fwd, gelu_tanh, [(5, 8)]),
        (activations.sqrelu_fwd, squared_relu, [(5, 8)]),
        (activations.swiglu_fwd, silu_times, [(5, 8), (5, 8)]),
    ],
)
def test_values_and_gradients(dtype, function, definition, shapes):
    inputs = [leaf(*shape, dtype=dtype) for shape in shapes]
    double = [t.detach().double().requires_grad_() for t in inputs]
    out, want = function(*inputs), definition(*double)
    assert out.dtype == dtype
    assert_close(out, want, scale=4)
    weight = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(out, inputs, weight)
    wants = torch.autograd.grad(want, double, weight.double())
    for grad, expected in zip(grads, wants, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, expected, scale=8 if expected.ndim > 1 else 30)


@pytest.mark.parametrize("function", [activations.swiglu, activations.bias_gelu_impl, activations.fast_gelu_impl])
def test_second_derivative(function):
    inputs = [leaf(3, 5, dtype=torch.float64), leaf(5, dtype=torch.float64)]
    if function is activations.swiglu:
        inputs[1] = leaf(3, 5, dtype=torch.float64)
    if function is activations.fast_gelu_impl:
        inputs.pop()
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_jacobian_products(dtype):
    x, y, g = (leaf(6, 7, dtype=dtype) for _ in range(3))
    double = [t.detach().double().requires_grad_() for t in (x, y)]
    wants = torch.autograd.grad(silu_times(*double), double, g.double())
    for got, want in zip(activations.swiglu_bwd(x, y, g), wants, strict=True):
        assert_close(got, want, scale=8)
    for name, definition in (("gelu_bwd", gelu_tanh), ("sqrelu_bwd", squared_relu), ("relu_bwd", torch.relu)):
        (want,) = torch.autograd.grad(definition(double[0]), double[0], g.double())
        got = getattr(activations, name)(g, x)
        assert got.dtype == dtype
        assert_close(got, want, scale=8)
    assert activations.relu_bwd(torch.tensor([3.0]), torch.tensor([0.0])) == 3.0
    bias = leaf(7, dtype=dtype)
    wide = [x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()]
    wants = torch.autograd.grad(gelu_tanh(wide[0] + wide[1]), wide, g.double())
    for got, want in zip(activations.bias_gelu_back(g, x, bias), wants, strict=True):
        assert_close(got, want, scale=30)


@pytest.mark.parametrize(
    ("activation", "definition"),
    [
        (Activation.ReLU, lambda x: x.clamp(min=0)),
        (Activation.LeakyReLU, lambda x: torch.where(x > 0, x, 0.01 * x)),
        (Activation.GeLU, lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
        (Activation.GeLUApprox, gelu_tanh),
        (Activation.SquaredReLU, squared_relu),
    ],
)
def test_triton_activations(activation, definition):
    x = leaf(200, dtype=torch.float64)
    want = definition(x)
    (grad,) = torch.autograd.grad(want.sum(), x)
    assert_close(k_activations.get_triton_activation_kernel(activation)(x), want)
    assert_close(k_activations.get_triton_activation_bwd_kernel(activation)(x), grad)
    assert k_activations.get_triton_activation_kernel(activation.value)(x).equal(
        getattr(k_activations, activation.value)(x)
    )


def test_triton_activation_names():
    assert k_activations.get_triton_activation_kernel(None) is None
    assert k_activations.get_triton_activation_bwd_kernel(None) is None
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert_close(k_activations.tanh(x), (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()))
    assert_close(k_activations.cosh(x), (x.exp() + (-x).exp()) / 2)
    assert k_activations.relu_grad(torch.zeros(1)) == 1
