"""Derivatives other than autograd's: right, or refused in words, never lost (Dao-AILab/flash-attention#1672)."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_varlen_func
from tests.attention import oracle

FORCED_KERNELS = ("decode", "simdgroup direct", "simdgroup staged", "scalar")
HOW = {"causal": True, "softcap": 2.0}


def drawn():
    return [torch.randn(1, 9, 2, 8) for _ in range(4)]


def expected(q, k, v, direction):
    """By central differences in float64."""
    step = 1e-6
    q, k, v, direction = (x.double() for x in (q, k, v, direction))
    ends = [oracle.dense(q + sign * step * direction, k, v, **HOW).out for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def dual(q, k, v, direction):
    with forward_ad.dual_level():
        out = flash_attn_func(forward_ad.make_dual(q, direction), k, v, **HOW)
        return forward_ad.unpack_dual(out).tangent


def jvp(q, k, v, direction):
    return torch.func.jvp(lambda q: flash_attn_func(q, k, v, **HOW), (q,), (direction,))[1]


@pytest.mark.parametrize("tangent_of", [dual, jvp])
def test_tangents(tier, tangent_of):
    """A kernel that is forced says that it has none; otherwise plain PyTorch computes them."""
    q, k, v, direction = drawn()
    if tier in FORCED_KERNELS:
        with pytest.raises(NotImplementedError, match="does not support forward_mode"):
            tangent_of(q, k, v, direction)
        return
    tangent = tangent_of(q, k, v, direction)
    torch.testing.assert_close(tangent.double(), expected(q, k, v, direction), rtol=1e-4, atol=1e-5)


def test_packed_tangents(tier):
    q, k, v, direction = (x[0] for x in drawn())
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with forward_ad.dual_level():
        if tier in FORCED_KERNELS:
            with pytest.raises(NotImplementedError, match="does not support forward_mode"):
                flash_attn_varlen_func(forward_ad.make_dual(q, direction), k, v, cu, cu, 9, 9, **HOW)
            return
        out = flash_attn_varlen_func(forward_ad.make_dual(q, direction), k, v, cu, cu, 9, 9, **HOW)
        tangent = forward_ad.unpack_dual(out).tangent
    exact = expected(*(x[None] for x in (q, k, v, direction)))[0]
    torch.testing.assert_close(tangent.double(), exact, rtol=1e-4, atol=1e-5)


def test_without_tangents_forward_mode_changes_nothing(tier):
    q, k, v, _ = drawn()
    with forward_ad.dual_level():
        inside = flash_attn_func(q, k, v, **HOW)
    assert torch.equal(inside, flash_attn_func(q, k, v, **HOW))


TRANSFORMS = {
    "grad": lambda q, k, v: torch.func.grad(lambda q: flash_attn_func(q, k, v).sum())(q),
    "vmap": lambda q, k, v: torch.func.vmap(lambda q: flash_attn_func(q, k, v))(q[None]),
    "vjp": lambda q, k, v: torch.func.vjp(lambda q: flash_attn_func(q, k, v), q),
    "hessian": lambda q, k, v: torch.func.hessian(lambda q: flash_attn_func(q, k, v).sum())(q),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_transforms_are_refused_in_words(tier, transform):
    q, k, v, _ = drawn()
    with pytest.raises(NotImplementedError, match="under the torch"):
        TRANSFORMS[transform](q, k, v)


def test_both_derivatives_at_once_are_refused(tier):
    q, k, v, direction = drawn()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="carry a tangent and require a gradient"):
        flash_attn_func(forward_ad.make_dual(q.requires_grad_(), direction), k, v)
