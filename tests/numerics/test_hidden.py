"""What a query does not see never reaches it, nor its gradients: not NaN, not an infinity."""

import math

import pytest
import torch

from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.dispatch import attention
from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_varlen_func
from flash_attn_mps.problem import with_mask
from flash_attn_mps.tiers import reference
from tests.attention import oracle

QUERIES, KEYS = 20, 40
WINDOWS = {  # how, and which keys no query before the split sees
    "causal": ({"causal": True}, slice(35, 40), 15),
    "window": ({"window_size": (7, 0)}, slice(35, 40), 15),
    "left window": ({"window_size": (5, 30)}, slice(0, 12), None),
}


@pytest.fixture
def readable_by(read_by, monkeypatch):
    """As `read_by`, where the torch tier looks whether there is anything to keep back."""
    if read_by == "device":
        monkeypatch.setattr(reference, "readable", lambda tensor: False)
    return read_by


def drawn(dtype):
    return torch.randn(1, QUERIES, 2, 16).to(dtype), *(torch.randn(1, KEYS, 1, 16).to(dtype) for _ in range(2))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", ["k", "v", "kv"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_hidden_key(tier, readable_by, window, operand, poison):
    how, poisoned, split = WINDOWS[window]
    q, k, v = drawn(torch.float32)
    exact = oracle.dense(*(x.double() for x in (q, k, v)), **how).out
    for name, x in (("k", k), ("v", v)):
        if name in operand:
            x[:, poisoned] = poison
    out = flash_attn_func(q, k, v, **how)
    seen_by = slice(0, split) if split is not None else slice(KEYS - QUERIES, QUERIES)
    torch.testing.assert_close(out[:, seen_by].double(), exact[:, seen_by], rtol=1e-5, atol=1e-5)


def test_a_hidden_key_and_gradients(tier, readable_by):
    """Queries that do not see it have the gradients that they have without it."""
    q, k, v = drawn(torch.float32)
    weight = torch.randn(1, QUERIES, 2, 16)
    weight[:, 15:] = 0.0
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    (exact,) = torch.autograd.grad(oracle.dense(*leaves, causal=True).out, leaves[0], weight.double())
    k[:, 35:], v[:, 35:] = math.nan, math.nan
    (dq,) = torch.autograd.grad(flash_attn_func(q.requires_grad_(), k, v, causal=True), q, weight)
    torch.testing.assert_close(dq[:, :15].double(), exact[:, :15], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_keys_of_a_sequence_without_queries(tier, readable_by, how):
    """They have no gradient, whatever they are, and the others have theirs."""
    cu_q, cu_k = torch.tensor([0, 0, 9], dtype=torch.int32), torch.tensor([0, 6, 20], dtype=torch.int32)
    q, k, v = torch.randn(9, 2, 16), torch.randn(20, 1, 16), torch.randn(20, 1, 16)
    leaves = [x.double()[None].requires_grad_() for x in (q, k[6:], v[6:])]
    exact = torch.autograd.grad(oracle.dense(*leaves, **how).out.sum(), leaves)
    k[:6], v[:6] = math.nan, math.nan
    mine = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(flash_attn_varlen_func(*mine, cu_q, cu_k, 9, 14, **how).sum(), mine)
    for grad, other in zip((grads[0], grads[1][6:], grads[2][6:]), exact, strict=True):
        torch.testing.assert_close(grad.double(), other[0], rtol=1e-4, atol=1e-5)
    for grad in grads[1:]:
        assert torch.equal(grad[:6], torch.zeros_like(grad[:6]))


@pytest.mark.parametrize("operand", [1, 2], ids=["k", "v"])
def test_a_key_that_a_mask_hides(tier, readable_by, operand):
    q, k, v = drawn(torch.float32)
    mask = torch.ones(1, 1, 1, KEYS, dtype=torch.bool)
    mask[..., 10:20] = False
    exact = oracle.dense(
        *(x.double() for x in (q, torch.cat([k[:, :10], k[:, 20:]], 1), torch.cat([v[:, :10], v[:, 20:]], 1)))
    ).out
    (q, k, v)[operand][:, 10:20] = math.nan
    out = attention(with_mask(dense(q, k, v, CallOptions()), mask)).out
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_keys_of_other_sequences(tier, readable_by):
    """Packed: what stands behind a sequence's end belongs to another, and is as hidden as a masked key."""
    q, k, v = (x[0] for x in drawn(torch.float32))
    cu_q, cu_k = torch.tensor([0, 9, 20], dtype=torch.int32), torch.tensor([0, 23, 40], dtype=torch.int32)
    exact = oracle.dense(q[None, :9].double(), k[None, :23].double(), v[None, :23].double(), causal=True).out[0]
    k[23:], v[23:] = math.nan, math.inf
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 11, 23, causal=True)
    torch.testing.assert_close(out[:9].double(), exact, rtol=1e-5, atol=1e-5)
