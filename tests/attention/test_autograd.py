"""What the functions are to autograd: which gradients exist, when, and what a second derivative says."""

import pytest
import torch

from flash_attn_mps.frontends import fa2, fa3

from . import oracle
from .layouts import randn
from .test_varlen import cumulative

CU = cumulative([9, 11])

CALLS = {
    "dense": fa2.flash_attn_func,
    "dense-sdpa": lambda q, k, v, **how: fa2.flash_attn_func(q, k, v, causal=True, **how),
    "dense-softcap": lambda q, k, v, **how: fa2.flash_attn_func(q, k, v, softcap=2.0, **how),
    "varlen": lambda q, k, v, **how: fa2.flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), CU, CU, 11, 11, **how
    ),
    "kvpacked": lambda q, k, v, **how: fa2.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **how),
    "fa3": fa3.flash_attn_func,
}


def leaves(requires_grad=True):
    return [randn(2, 10, 2, 16, dtype=torch.float32).requires_grad_(requires_grad) for _ in range(3)]


CLEAR = r"(?i)double backward|second|derivative for .* is not implemented"


@pytest.mark.parametrize("name", CALLS)
def test_second_derivative_is_refused_clearly(name):
    q, k, v = leaves()
    out = CALLS[name](q, k, v)
    with pytest.raises((RuntimeError, NotImplementedError), match=CLEAR):
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        dq.square().sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_gradient_penalty_is_refused_clearly(name):
    """A loss that holds the output and its gradient may not silently lose the second part."""
    q, k, v = leaves()
    out = CALLS[name](q, k, v)
    with pytest.raises((RuntimeError, NotImplementedError), match=CLEAR):
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(out.sum() + dq.square().sum(), (q, k, v))


@pytest.mark.parametrize("name", CALLS)
def test_no_graph_without_need(name):
    assert not CALLS[name](*leaves(requires_grad=False)).requires_grad
    q, k, v = leaves()
    with torch.no_grad():
        assert not CALLS[name](q, k, v).requires_grad
    with torch.inference_mode():
        assert CALLS[name](q, k, v).is_inference()


@pytest.mark.parametrize("name", CALLS)
def test_grad_accumulates_and_out_may_change_in_place(name):
    """`backward()` twice over two graphs adds up; writing into the result is right or refused."""
    q, k, v = leaves()
    CALLS[name](q, k, v).sum().backward()
    once = v.grad.clone()
    CALLS[name](q, k, v).sum().backward()
    torch.testing.assert_close(v.grad, 2 * once)

    expected = torch.autograd.grad((CALLS[name](q, k, v) * 3).sum(), (q, k, v))
    out = CALLS[name](q, k, v)
    try:
        got = torch.autograd.grad(out.mul_(3).sum(), (q, k, v))
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error)
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_input_changed_before_backward_is_noticed(name):
    q, k, v = leaves()
    x = k * 1.0
    out = CALLS[name](q, x, v)
    x.zero_()
    if name == "kvpacked":  # torch.stack made a copy
        torch.autograd.grad(out.sum(), q)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.square().sum(), q)


@pytest.mark.parametrize("name", ["dense", "dense-softcap", "varlen", "kvpacked"])
def test_lse_beside_out(name):
    """The triple is differentiable through out with the same gradients."""
    q, k, v = leaves()
    out, _, _ = CALLS[name](q, k, v, return_attn_probs=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(CALLS[name](q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lse_has_its_true_gradient_or_none(dropout_p):
    """A loss on the log-sum-exp (a z-loss) may be refused, but it may not get a gradient of zero without a word."""
    q, k, v = leaves()
    out, lse, s_dmask = fa2.flash_attn_func(q, k, v, dropout_p=dropout_p, return_attn_probs=True)
    assert not s_dmask.requires_grad
    if not lse.requires_grad:
        return
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keep = ~torch.signbit(s_dmask) if dropout_p else None
    true = oracle.dense(*exact, keep=keep, dropout_p=dropout_p)
    wanted = torch.autograd.grad(true.lse.square().sum() + true.out.sum(), exact)
    try:
        ours = torch.autograd.grad(lse.square().sum() + out.sum(), (q, k, v))
    except (RuntimeError, NotImplementedError) as error:
        assert "softmax_lse" in str(error)
        return
    for mine, exactly in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exactly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dropout_p"), [(name, 0.0) for name in CALLS] + [("dense", 0.3), ("varlen", 0.3), ("kvpacked", 0.3)]
)
def test_backward_twice_through_one_graph(name, dropout_p):
    """Nothing that is saved is used up: the second pass gives the same bits."""
    q, k, v = leaves()
    how = {"dropout_p": dropout_p} if dropout_p else {}
    out = CALLS[name](q, k, v, **how).square().sum()
    first = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, (q, k, v)), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_may_be_offloaded(name):
    """What is kept for the backward pass goes through autograd's hooks, as activation offloading needs it."""
    q, k, v = leaves()
    expected = torch.autograd.grad(CALLS[name](q, k, v).sum(), (q, k, v))
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = CALLS[name](q, k, v)
    assert len(packed) >= 4  # q, k, v and out or the log-sum-exp
    got = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradient_through_a_computed_input():
    """Inputs that are themselves the result of a packed projection, cut up by views."""
    weight = (torch.randn(3 * 4 * 8, 24) / 5).requires_grad_()
    x = torch.randn(2, 15, 24)
    exact_weight = weight.detach().double().requires_grad_()

    def projected(w, x):
        return (x @ w.T).view(2, 15, 3, 4, 8).unbind(2)

    ours = fa2.flash_attn_func(*projected(weight, x), causal=True)
    true = oracle.dense(*projected(exact_weight, x.double()), causal=True).out
    (mine,) = torch.autograd.grad(ours.sum(), weight)
    (wanted,) = torch.autograd.grad(true.sum(), exact_weight)
    torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "how", [{}, {"causal": True, "softcap": 2.0}, {"window_size": (3, 2), "alibi_slopes": torch.ones(2)}], ids=str
)
def test_gradients_against_finite_differences(how):
    """In fp32, along random directions: independent of the oracle's backward pass."""
    q, k, v = leaves()
    out = fa2.flash_attn_func(q, k, v, **how)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for index, gradient in enumerate(grads):
        direction = torch.randn_like(gradient)
        step = 1e-2
        values = []
        for sign in (1, -1):
            moved = [x.detach().clone() for x in (q, k, v)]
            moved[index] += sign * step * direction
            values.append((fa2.flash_attn_func(*moved, **how).double() * weight).sum().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=2e-2)
