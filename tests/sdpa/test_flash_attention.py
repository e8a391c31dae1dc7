"""`flash_attention`, of the older Mac packages: `(batch, heads, seqlen, head_dim)`, always served here."""

import inspect

import pytest
import torch

import flash_attn_mps
from flash_attn_mps import flash_attention
from tests.sdpa.exact import assert_right

Q, K = torch.randn(2, 4, 21, 64).half(), torch.randn(2, 2, 30, 64).half()
MASK = torch.randn(21, 30)


def test_it_is_public():
    assert flash_attn_mps.flash_attention is flash_attention
    assert list(inspect.signature(flash_attention).parameters)[:4] == ["query", "key", "value", "is_causal"]


@pytest.mark.parametrize(
    "how", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": MASK}, {"attn_mask": MASK.half()}]
)
def test_values(tier, how):
    out = flash_attention(Q, K, K, **how)
    assert_right(out, [Q, K, K], {"enable_gqa": True, **how})


def test_gradients_and_dropout():
    q = Q.float().requires_grad_()
    flash_attention(q, q, q, True).sum().backward()
    assert q.grad.isfinite().all()
    torch.manual_seed(5)
    first = flash_attention(Q, K, K, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, flash_attention(Q, K, K, dropout_p=0.5))
    assert not torch.equal(first, flash_attention(Q, K, K))


@pytest.mark.parametrize("how", [{"is_causal": True}, {"attn_mask": MASK.float()}])
def test_compiled_without_a_break(how):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: flash_attention(q, K.float(), K.float(), **how), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q.float()), flash_attention(Q.float(), K.float(), K.float(), **how))
    torch._dynamo.reset()


MALFORMED = [
    (ValueError, "query", (Q[0], K, K), {}),
    (ValueError, "key", (Q, [1.0], K), {}),
    (ValueError, "key", (Q, K[:, :, :, :5], K), {}),
    (ValueError, "value", (Q, K, K.float()), {}),
    (NotImplementedError, "attn_mask", (Q, K, K), {"attn_mask": MASK > 0}),
    (ValueError, "attn_mask", (Q, K, K), {"attn_mask": MASK, "is_causal": True}),
    (ValueError, "attn_mask", (Q, K, K), {"attn_mask": MASK.double()}),
    (ValueError, "attn_mask", (Q, K, K), {"attn_mask": MASK[:5]}),
    (ValueError, "attn_mask", (Q, K, K), {"attn_mask": 1.0}),
    (ValueError, "dropout_p", (Q, K, K), {"dropout_p": 1.0}),
    (ValueError, "scale", (Q, K, K), {"scale": "a"}),
]


@pytest.mark.parametrize("error,named,args,how", MALFORMED)
def test_malformed_calls(error, named, args, how):
    with pytest.raises(error, match=f"^{named}: "):
        flash_attention(*args, **how)
