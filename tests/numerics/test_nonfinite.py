"""What a query does see counts, whatever it is: NaN and infinities are not lost, scales of any sign are honoured."""

import math

import pytest
import torch

from flash_attn_mps.frontends import fa2, fa3
from tests.attention import oracle
from tests.attention.rule import assert_within_rule


@pytest.mark.parametrize("keys", [1, 3, 8, 15, 16, 40])
@pytest.mark.parametrize("operand", [0, 1], ids=["q", "k"])
def test_nan_is_not_lost(tier, keys, operand):
    """In blocks of any number of keys (pytorch#141128); of one query it stays with that query."""
    tensors = [torch.randn(1, n, 1, 8) for n in (5, keys, keys)]
    exact = oracle.dense(*(x.double() for x in tensors)).out
    tensors[operand][0, 0] = math.nan
    out, lse, _ = fa2.flash_attn_func(*tensors, return_attn_probs=True)
    assert out[0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    if operand == 0:
        torch.testing.assert_close(out[0, 1:].double(), exact[0, 1:], rtol=1e-5, atol=1e-5)
        assert lse[0, 0, 1:].isfinite().all()


def test_scores_that_are_all_minus_infinity(tier):
    """As overflow makes them: such a row sees nothing."""
    q, k = torch.full((1, 2, 1, 8), 1e20), torch.full((1, 3, 1, 8), -1e20)
    out, lse, _ = fa2.flash_attn_func(q, k, torch.randn(1, 3, 1, 8), return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()


CALLS = {
    "FA2": fa2.flash_attn_func,
    "FA3": fa3.flash_attn_func,
    "packed": lambda q, k, v, **how: fa2.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **how),
}


@pytest.mark.parametrize(
    ("call", "causal", "scale"),
    [
        ("FA2", True, 0.0),
        ("FA2", False, 0.0),
        ("FA2", True, -0.4),
        ("FA2", False, -0.4),
        ("FA3", True, -0.4),
        ("packed", True, -1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_that_are_not_above_0(tier, call, causal, scale, dtype):
    """Values and gradients (NVIDIA/cudnn-frontend#804)."""
    tensors = [torch.randn(2, 21, 2, 16, dtype=dtype).requires_grad_() for _ in range(3)]
    how = {"softmax_scale": scale, "causal": causal}
    weight = torch.randn(2, 21, 2, 16, dtype=dtype)
    out = CALLS[call](*tensors, **how)
    grads = torch.autograd.grad(out, tensors, weight)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [x.detach().to(kind).requires_grad_() for x in tensors]
        expected = oracle.dense(*leaves, **how).out
        results.append((expected.detach(), *torch.autograd.grad(expected, leaves, weight.to(kind))))
    for name, mine, plain, exact in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), *results, strict=True):
        assert_within_rule(name, mine, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_shared_heads_are_summed_in_float32(tier, dtype):
    """Eight query heads over one: what plain PyTorch has of rounding, and not eight times that."""
    q = torch.randn(1, 50, 8, 128).to(dtype).requires_grad_()
    k, v = (torch.randn(1, 3, 1, 128).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(1, 50, 8, 128).to(dtype)
    grads = torch.autograd.grad(fa2.flash_attn_func(q, k, v), (q, k, v), weight)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(oracle.dense(*leaves).out, leaves, weight.to(kind)))
    for name, mine, plain, exact in zip(("dq", "dk", "dv"), grads, *results, strict=True):
        assert_within_rule(name, mine, plain, exact)
