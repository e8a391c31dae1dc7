"""Scores of any finite size: the largest probability is exactly 1 (pytorch#121558), and gradients keep their digits."""

import math

import pytest
import torch

from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_varlen_func
from tests.attention import oracle
from tests.attention.rule import assert_within_rule

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96.0, 1024.0, 5736.0, 19296.0, 60000.0])
@pytest.mark.parametrize("dim", [1, 64])
def test_one_key(tier, dtype, size, dim):
    """Its probability is 1, so the output is its value to the last bit."""
    q = torch.full((1, 1, 1, dim), size).to(dtype)
    v = torch.randn(1, 1, 1, dim).to(dtype)
    out, lse, _ = flash_attn_func(q, q, v, return_attn_probs=True)
    assert torch.equal(out, v)
    exact = (q.double() * q.double()).sum().item() * dim**-0.5
    assert abs(lse.item() - exact) <= 4e-6 * exact  # as exact as a sum of 64 products


@pytest.mark.parametrize("exponent", range(0, 31, 5))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_from_1_to_1e30(tier, exponent, dtype):
    """Rows in which one key wins by far: its value comes out, in whatever order the keys come."""
    size = 10.0 ** (exponent / 2)
    q = torch.ones(1, 6, 2, 16) * size * 4
    k = torch.linspace(-1, 1, 40).view(1, 40, 1, 1) * torch.ones(1, 40, 2, 16) * size
    k = k[:, torch.randperm(40)]
    v = torch.randn(1, 40, 2, 16)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    exact = oracle.dense(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(out.double(), exact.out, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=2e-6, atol=1e-5)


def flash_backward(q, k, v, dout, dtype, how):
    """What FlashAttention's formula gives in exact arithmetic from an output that was rounded to `dtype`."""
    exact = oracle.dense(q, k, v, **how)
    delta = (dout * exact.out.to(dtype).double()).sum(-1).transpose(1, 2)
    p, scale = exact.p, q.shape[-1] ** -0.5
    ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta[..., None])
    return (
        torch.einsum("bhqk,bkhd->bqhd", ds, k) * scale,
        torch.einsum("bhqk,bqhd->bkhd", ds, q) * scale,
        torch.einsum("bhqk,bqhd->bkhd", p, dout),
    )


@pytest.mark.parametrize("std", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"window_size": (9, 3)}], ids=str)
def test_values_and_gradients(tier, std, dtype, how):
    """As exact as float32 arithmetic and one rounding of the results, whichever tier gave the log-sum-exp."""
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(1, 33, 2, 64, generator=generator).mul_(s).to(dtype) for s in (std, std, 1.0)]
    weight = torch.randn(1, 33, 2, 64, generator=generator).to(dtype)
    results = []
    for kind in (torch.float64, torch.float32):
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        out = oracle.dense(*leaves, **how).out
        results.append((out.detach(), *torch.autograd.grad(out, leaves, weight.to(kind))))
    mine = [x.clone().requires_grad_() for x in tensors]
    out = flash_attn_func(*mine, **how)
    grads = torch.autograd.grad(out, mine, weight)
    exact, plain = results
    formula = (exact[0], *flash_backward(*(x.double() for x in (*tensors, weight)), dtype, how))
    # A difference of two sums of products of dout and v, which ought to be zero where p is 1, times k or q.
    cancelled = 2e-6 * (weight.abs().double().sum(-1).max() * tensors[2].abs().max()).item() * std
    for name, *values in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), exact, plain, formula, strict=True):
        got, true, in_float32, rounded = (x.double() for x in values)
        allowed = 4 * (in_float32 - true).abs().max() + 2 * (rounded - true).abs().max() + 1e-5
        allowed += 2 * torch.finfo(dtype).eps * true.abs().max() + (cancelled if name in ("dq", "dk") else 0.0)
        error = (got - true).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("feature", ["softcap", "alibi", "varlen"])
def test_features_over_large_scores(tier, feature):
    q, k, v = (torch.randn(1, 20, 2, 32) * s for s in (1e4, 1e4, 1.0))
    how = {}
    if feature == "softcap":
        how = {"softcap": 1e6}
    if feature == "alibi":
        how = {"alibi_slopes": torch.tensor([1e5, 3.0])}
    exact, plain = oracle.dense(*(x.double() for x in (q, k, v)), **how), oracle.dense(q, k, v, **how)
    if feature == "varlen":
        cu = torch.tensor([0, 20], dtype=torch.int32)
        out = flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 20, 20)[None]
    else:
        out = flash_attn_func(q, k, v, **how)
    assert_within_rule("out", out, plain.out, exact.out)


def test_a_scale_that_is_no_normal_number(tier):
    """What a GPU takes for 0: all scores are equal, and hidden keys stay hidden."""
    q, k, v = (torch.randn(1, 9, 1, 16) for _ in range(3))
    out = flash_attn_func(q, k, v, softmax_scale=1e-42, causal=True)
    mean = v[0, :, 0].cumsum(0) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(out[0, :, 0], mean, rtol=1e-5, atol=1e-6)
    assert math.isfinite(out.sum())


def test_a_softcap_that_is_tiny_beside_the_scale(tier):
    """Their ratio is beyond float32; a score of 0 stays 0, and any other is the cap."""
    q, v = torch.zeros(1, 3, 1, 16), torch.randn(1, 3, 1, 16)
    q[0, 2] = 1.0
    out = flash_attn_func(q, q, v, softmax_scale=1e30, softcap=1e-30)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(v), rtol=1e-5, atol=1e-6)
