"""Linear layers and MLPs of `ops.fused_dense`, `ops.triton.{linear,mlp}` and `modules.mlp` against matrix products."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from flash_attn.modules import mlp
from flash_attn.ops.fused_dense import FusedDense, FusedMLP, FusedMLPFunc, fused_dense_func, fused_mlp_func
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense

from .reference import assert_close


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_approx(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sqrelu(x):
    return x.clamp(min=0) ** 2


ACTIVATIONS = {"gelu_approx": gelu_approx, "relu": lambda x: x.clamp(min=0), "sqrelu": sqrelu}


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def same_values_and_gradients(got, want, inputs):
    assert_close(got, want)
    weight = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, inputs, weight), torch.autograd.grad(want, inputs, weight), strict=True):
        assert_close(g, w, scale=20)


@pytest.mark.parametrize("return_residual", [False, True])
def test_fused_dense(return_residual):
    x = leaf(2, 3, 5)
    layer = FusedDense(5, 7, return_residual=return_residual, dtype=torch.float64)
    assert list(layer.state_dict()) == ["weight", "bias"]
    out = layer(x)
    if return_residual:
        out, residual = out
        assert residual is x
    same_values_and_gradients(out, x @ layer.weight.T + layer.bias, [x, *layer.parameters()])
    assert_close(fused_dense_func(x, layer.weight), x @ layer.weight.T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
@pytest.mark.parametrize(("save_pre_act", "return_residual"), [(True, False), (False, True)])
def test_fused_mlp_func(activation, checkpoint_lvl, save_pre_act, return_residual):
    x, w1, w2, b1, b2 = leaf(2, 3, 5), leaf(8, 5), leaf(6, 8), leaf(8), leaf(6)
    calls = []
    hook = torch.autograd.graph.saved_tensors_hooks(lambda t: calls.append(t.shape) or t, lambda t: t)
    with hook:
        out = fused_mlp_func(
            x,
            w1,
            w2,
            b1,
            b2,
            activation=activation,
            save_pre_act=save_pre_act,
            return_residual=return_residual,
            checkpoint_lvl=checkpoint_lvl,
        )
    hidden = sum(shape[-1] == 8 and len(shape) == 3 for shape in calls)
    if return_residual:
        out, residual = out
        assert residual is x
    if not save_pre_act or checkpoint_lvl == 2:
        assert hidden == 0
    elif checkpoint_lvl == 1:
        assert hidden == 1
    want = ACTIVATIONS[activation](x @ w1.T + b1) @ w2.T + b2
    same_values_and_gradients(out, want, [x, w1, w2, b1, b2])
    other_order = FusedMLPFunc.apply(x, w1, b1, w2, b2, activation)
    assert torch.equal(other_order, out)


def test_fused_mlp_as_it_is_called():
    """The keywords of the call sites that were collected, and half precision."""
    x = leaf(2, 3, 16, dtype=torch.bfloat16)
    w1, w2 = leaf(32, 16, dtype=torch.bfloat16), leaf(16, 32, dtype=torch.bfloat16)
    out = fused_mlp_func(
        x=x,
        weight1=w1,
        weight2=w2,
        bias1=None,
        bias2=None,
        activation="gelu_approx",
        save_pre_act=True,
        return_residual=False,
        checkpoint_lvl=0,
        heuristic=0,
        process_group=None,
    )
    want = gelu_approx(x.double() @ w1.double().T) @ w2.double().T
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=0.03, atol=0.03 * want.abs().max().item())


@pytest.mark.parametrize(
    ("module", "definition"),
    [
        (lambda **k: FusedMLP(6, 10, 4, **k), gelu_approx),
        (lambda **k: FusedMLP(in_features=6, hidden_features=12, heuristic=0, **k), gelu_approx),
        (lambda **k: FusedMLP(6, activation="sqrelu", checkpoint_lvl=1, **k), sqrelu),
        (lambda **k: FusedDenseSqreluDense(6, 10, 4, checkpoint_lvl=2, **k), sqrelu),
        (lambda **k: mlp.Mlp(6, 10, 4, **k), gelu),
        (lambda **k: mlp.Mlp(6, activation=F.relu, **k), F.relu),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_mlp_modules(module, definition, training):
    module = module(dtype=torch.float64).train(training)
    assert list(module.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    x = leaf(3, 6)
    hidden = definition(x @ module.fc1.weight.T + module.fc1.bias)
    same_values_and_gradients(module(x), hidden @ module.fc2.weight.T + module.fc2.bias, [x, *module.parameters()])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_default_features_and_no_bias():
    for cls in (mlp.Mlp, FusedMLP):
        module = cls(6, bias1=False, bias2=False)
        assert module.fc1.weight.shape == (24, 6)
        assert module.fc2.weight.shape == (6, 24)
        assert list(module.state_dict()) == ["fc1.weight", "fc2.weight"]
    for cls in (mlp.Mlp, FusedMLP, mlp.GatedMlp):
        x = torch.randn(2, 6)
        out, residual = cls(6, return_residual=True)(x)
        assert residual is x
        assert out.shape == (2, 6)


@pytest.mark.parametrize(
    ("activation", "definition"),
    [(F.sigmoid, torch.sigmoid), (F.silu, lambda x: x * torch.sigmoid(x)), (F.gelu, gelu)],
)
def test_gated_mlp(activation, definition):
    module = mlp.GatedMlp(6, 10, 4, activation=activation, multiple_of=8, dtype=torch.float64)
    assert module.fc1.weight.shape == (32, 6)
    x = leaf(3, 6)
    y = x @ module.fc1.weight.T + module.fc1.bias
    hidden = y[:, :16] * definition(y[:, 16:])
    same_values_and_gradients(module(x), hidden @ module.fc2.weight.T + module.fc2.bias, [x, *module.parameters()])
    assert mlp.GatedMlp(100).fc1.weight.shape == (2 * 384, 100)  # 266 rounded up to a multiple of 128


@pytest.mark.parametrize(
    ("activation", "definition"),
    [("id", lambda x: x), ("gelu", gelu), ("gelu_approx", gelu_approx), ("squared_relu", sqrelu)],
)
def test_triton_linear(activation, definition):
    x, weight, bias = leaf(2, 3, 5), leaf(7, 5), leaf(7)
    out, act_input = triton_linear_act(x, weight, bias, activation=activation, save_act_input=True)
    assert_close(act_input, x @ weight.T + bias)
    same_values_and_gradients(out, definition(x @ weight.T + bias), [x, weight, bias])
    assert torch.equal(triton_linear_act(x, weight, bias, activation), out)
    grad_output, weight2 = torch.randn(2, 3, 4, dtype=torch.float64), leaf(4, 7)
    act_input = act_input.detach().requires_grad_()
    (want,) = torch.autograd.grad(definition(act_input) @ weight2.T, act_input, grad_output)
    assert_close(triton_dgrad_act(grad_output, weight2, activation, act_input), want)


def test_malformed_calls():
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match="activation must be one of gelu_approx, relu, sqrelu, got 'tanh'"):
        fused_mlp_func(x, w, w, activation="tanh")
    with pytest.raises(ValueError, match="checkpoint_lvl must be 0, 1 or 2, got 3"):
        FusedMLP(4, checkpoint_lvl=3)
    with pytest.raises(ValueError, match="checkpoint_lvl must be"):
        FusedDenseSqreluDense(4, checkpoint_lvl=-1)
    with pytest.raises(ValueError, match="activation must be"):
        triton_linear_act(x, w, activation="relu6")
    with pytest.raises(ValueError, match="act_input must be given"):
        triton_dgrad_act(x, w, "gelu")
