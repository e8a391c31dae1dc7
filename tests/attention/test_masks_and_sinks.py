"""Masks and sinks in the torch tier: values, gradients and what hidden memory may hold, against the float64 oracle."""

import math

import pytest
import torch

from flash_attn_mps import dispatch
from flash_attn_mps.describe import CallOptions, dense, varlen
from flash_attn_mps.problem import with_mask, with_sinks
from flash_attn_mps.tiers import reference

from . import oracle

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, DIM = 2, 7, 10, 4, 2, 16


def draw(dtype=torch.float32, requires_grad=False):
    """q, k, v and sinks."""
    shapes = [(BATCH, SEQLEN_Q, HEADS, DIM), *[(BATCH, SEQLEN_K, HEADS_K, DIM)] * 2, (HEADS,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def bool_mask():
    """Row 3 of every head sees nothing; column 5 is seen by nobody."""
    mask = torch.rand(BATCH, HEADS, SEQLEN_Q, SEQLEN_K) > 0.4
    mask[..., 3, :] = mask[..., 5] = False
    return mask


def added(mask):
    return torch.randn(mask.shape).masked_fill_(~mask, -math.inf)


def expected(q, k, v, mask, sinks, **how):
    """The oracle's output (B, Sq, H, Dv) and log-sum-exp (B, H, Sq)."""
    done = [
        oracle.one_sequence(q[b], k[b], v[b], mask=None if mask is None else mask[b], sinks=sinks, **how)
        for b in range(BATCH)
    ]
    out, lse, _ = zip(*done, strict=True)
    return torch.stack(out), torch.stack(lse)


def attend(q, k, v, mask=None, sinks=None, **how):
    p = dense(q, k, v, CallOptions(want_lse=True, **how))
    p = p if mask is None else with_mask(p, mask)
    return dispatch.attention(p if sinks is None else with_sinks(p, sinks), without=frozenset({"cpu"}))


@pytest.mark.parametrize("how", [{}, {"causal": True}, {"window_size": (2, 1), "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("kind", [None, "bool", "added"])
@pytest.mark.parametrize("loss_of", ["out", "lse", "both"])
def test_gradients_of_queries_keys_values_and_sinks(how, kind, loss_of):
    mask = None if kind is None else bool_mask()
    mask = added(mask) if kind == "added" else mask
    ours, exact = draw(requires_grad=True), None
    exact = [x.detach().double().requires_grad_() for x in ours]
    result = attend(*ours[:3], mask, ours[3], **how)
    out, lse = expected(*exact[:3], mask, exact[3], **how)
    torch.testing.assert_close(result.out.double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, dtype=torch.float64), torch.randn(lse.shape, dtype=torch.float64)

    def gradients(out, lse, inputs):
        parts = [(t.double() * w).sum() for t, w in zip((out, lse), weights, strict=True)]
        loss = {"out": parts[0], "lse": parts[1], "both": sum(parts)}[loss_of]
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    got, wanted = gradients(result.out, result.lse, ours), gradients(out, lse, exact)
    assert wanted[3].abs().min() > 1e-3
    for mine, exactly in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exactly, rtol=1e-4, atol=1e-5)


def test_sinks_alone_may_require_grad():
    q, k, v, sinks = draw()
    sinks.requires_grad_()
    attend(q, k, v, None, sinks).out.sum().backward()
    exact = [x.detach().double() for x in (q, k, v, sinks)]
    exact[3].requires_grad_()
    expected(*exact[:3], None, exact[3])[0].sum().backward()
    torch.testing.assert_close(sinks.grad.double(), exact[3].grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_bfloat16_sinks_is_bfloat16():
    q, k, v, sinks = draw(torch.bfloat16)
    sinks.requires_grad_()
    attend(q, k, v, None, sinks).out.sum().backward()
    assert sinks.grad.dtype == torch.bfloat16
    assert sinks.grad.abs().sum() > 0


def test_a_second_derivative_of_sinks_is_refused():
    *qkv, sinks = draw()
    sinks.requires_grad_()
    (grad,) = torch.autograd.grad(attend(*qkv, None, sinks).out.square().sum(), sinks, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("seqlen_k", [0, 3])
def test_a_query_that_sees_no_key_has_its_sink(seqlen_k):
    """Causal, so the first queries see nothing: zeros, the sink as log-sum-exp, and the gradient of that."""
    q, k, v, sinks = draw(requires_grad=True)
    result = attend(q, k[:, :seqlen_k], v[:, :seqlen_k], None, sinks, causal=True)
    blind = SEQLEN_Q - seqlen_k
    assert (result.out[:, :blind] == 0).all()
    assert torch.equal(result.lse[:, :, :blind], sinks.detach()[None, :, None].expand(BATCH, HEADS, blind))
    (grad,) = torch.autograd.grad(result.lse[:, :, :blind].sum(), sinks)
    torch.testing.assert_close(grad, torch.full((HEADS,), float(BATCH * blind)))


def test_rows_that_are_no_queries_have_no_sink():
    """Rows beyond seqused_q: -inf. A sequence without keys: the sink."""
    starts, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 4, 9], [3, 0, 5]))
    starts_k = torch.tensor([0, 6, 8, 8], dtype=torch.int32)
    q, k, sinks = torch.randn(9, HEADS, DIM), torch.randn(8, HEADS_K, DIM), torch.randn(HEADS)
    p = varlen(q, k, k, starts, starts_k, 5, 6, CallOptions(want_lse=True), seqused_q=used)
    lse = reference.run(with_sinks(p, sinks)).lse
    assert torch.isneginf(lse[:, 3]).all()
    assert lse[:, :3].isfinite().all()
    assert torch.equal(lse[:, 4:], sinks[:, None].expand(-1, 5))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize("kind", ["bool", "added", "causal"])
def test_what_is_hidden_from_a_query_does_not_reach_it(kind, operand, value):
    """One key or value is not finite. Queries that do not see it, and keys that those alone see, are as without it."""
    inputs = draw(requires_grad=True)[:3]
    mask = None if kind == "causal" else bool_mask()
    seen = torch.ones(BATCH, HEADS, SEQLEN_Q, SEQLEN_K, dtype=torch.bool).tril(3) if mask is None else mask.clone()
    if kind == "added":
        mask = added(mask)
    how = {"causal": kind == "causal"}

    def run(change):
        x = [t.detach().clone() for t in inputs]
        if change:
            x[operand][:, 8, :, 3] = value
        leaves = [t.requires_grad_() for t in x]
        out = attend(*leaves, mask, **how).out
        spared = ~seen[..., 8].transpose(1, 2)  # (B, Sq, H): queries that do not see the key
        grads = torch.autograd.grad((out.masked_fill(~spared[..., None], 0.0)).square().sum(), leaves)
        return out.detach(), grads, spared

    (clean, clean_grads, spared), (out, grads, _) = run(False), run(True)
    assert spared.any()
    assert not spared.all()
    torch.testing.assert_close(out[spared], clean[spared])
    torch.testing.assert_close(grads[0][spared], clean_grads[0][spared])
    if math.isnan(value):
        assert out[~spared].isnan().any(-1).all()
    elif operand == 2:
        assert not out[~spared][:, 3].isfinite().any()
    for n in (1, 2):  # of a key that nobody sees, whatever it holds
        assert not grads[n][:, 5].any() or kind == "causal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_least_finite_number_hides_from_those_alone_who_see_something_else(dtype):
    """Added to every key of a row it changes nothing, as torch.softmax has it; beside a visible key it hides."""
    lowest = torch.finfo(dtype).min
    q, k, v, _ = (x.to(dtype).requires_grad_() for x in draw())
    mask = torch.zeros(SEQLEN_Q, SEQLEN_K, dtype=dtype)
    mask[0] = lowest
    mask[1, 2:] = lowest
    q.data[:, 0] = 0.0  # scores that are alike: added to -65504, others would be rounded to 2 ** -9
    result = attend(q, k, v, mask)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = expected(*exact, mask.double().expand(BATCH, HEADS, -1, -1), None)
    torch.testing.assert_close(result.out.double(), out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)
    mean = v.detach().double().mean(1, keepdim=True).repeat_interleave(2, 2)[:, 0]
    torch.testing.assert_close(result.out[:, 0].double(), mean, rtol=2e-2, atol=2e-2)
    for mine, exactly in zip(
        torch.autograd.grad(result.out.float().square().sum(), (q, k, v)),
        torch.autograd.grad(out.square().sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), exactly, rtol=5e-2, atol=5e-2)
