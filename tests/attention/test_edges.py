"""Rows that see nothing, sizes of zero, memory that is out of range, what is returned, and what is left alone."""

import pytest
import torch

from flash_attn_mps.frontends import fa2

from . import oracle
from .layouts import randn
from .test_dense import DTYPES
from .test_varlen import cumulative

NAN = float("nan")

# Calls in which some queries see no key: (seqlen_q, seqlen_k, how, number of queries at the top that see none).
BLIND = {
    "causal": (9, 5, {"causal": True}, 4),
    "causal-one-key": (70, 1, {"causal": True}, 69),
    "window": (9, 5, {"window_size": (2, 1)}, 3),
    "self": (9, 5, {"window_size": (0, 0)}, 4),
    "features": (9, 5, {"causal": True, "softcap": 2.0, "alibi_slopes": torch.ones(2)}, 4),
    "dropout": (9, 5, {"causal": True, "dropout_p": 0.2}, 4),
    "no-keys": (9, 0, {}, 9),
    "no-keys-causal": (9, 0, {"causal": True, "softcap": 2.0}, 9),
}


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLIND)
def test_rows_that_see_nothing(name, dtype, probs):
    seqlen_q, seqlen_k, how, blind = BLIND[name]
    q = randn(2, seqlen_q, 2, 16, dtype=dtype).requires_grad_()
    k, v = (randn(2, seqlen_k, 2, 16, dtype=dtype).requires_grad_() for _ in range(2))
    result = fa2.flash_attn_func(q, k, v, return_attn_probs=probs, **how)
    out = result[0] if probs else result
    assert (out[:, :blind] == 0).all()
    assert torch.isfinite(out).all()
    if probs:
        lse = result[1]
        assert torch.isneginf(lse[..., :blind]).all()
        assert torch.isfinite(lse[..., blind:]).all()
    dq, dk, dv = torch.autograd.grad(out.float().square().sum() + out.float().sum(), (q, k, v))
    assert (dq[:, :blind] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert dk.shape == k.shape
    assert seqlen_k == 0 or dv.abs().sum() > 0


ZERO_SIZED = [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), ZERO_SIZED)
@pytest.mark.parametrize(
    "how", [{}, {"causal": True}, {"dropout_p": 0.2}, {"softcap": 1.0, "window_size": (1, 1)}], ids=str
)
def test_sizes_of_zero(batch, seqlen_q, seqlen_k, how):
    q = torch.randn(batch, seqlen_q, 4, 16, requires_grad=True)
    k, v = (
        torch.randn(batch, seqlen_k, 2, 16, requires_grad=True),
        torch.randn(batch, seqlen_k, 2, 24, requires_grad=True),
    )
    out, lse, _ = fa2.flash_attn_func(q, k, v, return_attn_probs=True, **how)
    assert out.shape == (batch, seqlen_q, 4, 24)
    assert lse.shape == (batch, 4, seqlen_q)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()
    grads = torch.autograd.grad(fa2.flash_attn_func(q, k, v, **how).sum(), (q, k, v))
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_varlen_without_tokens(sequences):
    cu = torch.zeros(sequences + 1, dtype=torch.int32)
    q, k, v = (torch.randn(0, 2, 16, requires_grad=True) for _ in range(3))
    out, lse, _ = fa2.flash_attn_varlen_func(q, k, v, cu, cu, 0, 0, return_attn_probs=True)
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    assert torch.autograd.grad(out.sum(), q)[0].shape == (0, 2, 16)


def test_packed_without_tokens():
    cu = torch.zeros(1, dtype=torch.int32)
    assert fa2.flash_attn_qkvpacked_func(torch.randn(2, 0, 3, 2, 8)).shape == (2, 0, 2, 8)
    assert fa2.flash_attn_kvpacked_func(torch.randn(2, 3, 2, 8), torch.randn(2, 0, 2, 2, 8)).eq(0).all()
    assert fa2.flash_attn_varlen_qkvpacked_func(torch.randn(0, 3, 2, 8), cu, 0).shape == (0, 2, 8)
    assert fa2.flash_attn_varlen_kvpacked_func(torch.randn(0, 2, 8), torch.randn(0, 2, 2, 8), cu, cu, 0, 0).shape == (
        0,
        2,
        8,
    )


def test_kvcache_of_length_zero():
    cache = torch.full((2, 8, 2, 16), NAN)
    lengths = torch.zeros(2, dtype=torch.int32)
    out, lse = fa2.flash_attn_with_kvcache(
        torch.randn(2, 3, 2, 16), cache, cache.clone(), cache_seqlens=lengths, return_softmax_lse=True
    )
    assert (out == 0).all()
    assert torch.isneginf(lse).all()
    assert fa2.flash_attn_with_kvcache(torch.randn(0, 1, 2, 16), cache[:0], cache[:0]).shape == (0, 1, 2, 16)
    assert fa2.flash_attn_with_kvcache(
        torch.randn(2, 0, 2, 16), torch.ones(2, 8, 2, 16), torch.ones(2, 8, 2, 16)
    ).shape == (
        2,
        0,
        2,
        16,
    )


@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "how", [{"window_size": (3, 0)}, {"window_size": (3, 2)}, {"causal": True, "window_size": (3, -1)}], ids=str
)
def test_keys_that_no_query_sees_do_not_leak(how, poison):
    """Left padding behind a sliding window: 40 keys, of which 8 queries see the last 11."""
    q = randn(1, 8, 2, 16, dtype=torch.float32).requires_grad_()
    k, v = (randn(1, 40, 2, 16, dtype=torch.float32) for _ in range(2))
    clean = [x.clone().requires_grad_() for x in (k, v)]
    k[:, :29], v[:, :29] = poison, poison
    dirty = [x.requires_grad_() for x in (k, v)]
    out, expected = fa2.flash_attn_func(q, *dirty, **how), fa2.flash_attn_func(q, *clean, **how)
    torch.testing.assert_close(out, expected)
    grads, expected_grads = (
        torch.autograd.grad(o.square().sum(), (q, *kv)) for o, kv in ((out, dirty), (expected, clean))
    )
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("poison", [NAN, float("inf")])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_cache_beyond_its_length_does_not_leak(seqlen_q, causal, poison):
    lengths = torch.tensor([9, 16, 1], dtype=torch.int32)
    k_cache, v_cache = (randn(3, 16, 2, 32, dtype=torch.float16) for _ in range(2))
    for b in range(3):
        k_cache[b, lengths[b] :], v_cache[b, lengths[b] :] = poison, poison
    q = randn(3, seqlen_q, 4, 32, dtype=torch.float16)
    out = fa2.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=causal)
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), cache_seqlens=lengths, causal=causal)
    torch.testing.assert_close(out.double(), exact.out, rtol=2e-3, atol=2e-3)


def test_nan_in_a_visible_key_shows():
    """A real NaN is not hidden either."""
    q, k, v = (randn(1, 8, 1, 16, dtype=torch.float32) for _ in range(3))
    k[0, 3, 0, 0] = NAN
    out = fa2.flash_attn_func(q, k, v, window_size=(0, 0))
    assert out[0, 3].isnan().all()


def test_s_dmask_is_empty_without_dropout():
    q = randn(1, 8, 2, 16, dtype=torch.float32)
    _, lse, s_dmask = fa2.flash_attn_func(q, q, q, return_attn_probs=True)
    assert isinstance(s_dmask, torch.Tensor)
    assert s_dmask.numel() == 0
    assert lse.dtype == torch.float32
    cu = cumulative([8])
    assert fa2.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 8, 8, return_attn_probs=True)[2].numel() == 0


def test_deterministic_is_accepted_and_is_true():
    q, k, v = (randn(1, 60, 2, 16, dtype=torch.float32).requires_grad_() for _ in range(3))
    runs = [
        torch.autograd.grad(fa2.flash_attn_func(q, k, v, causal=True, deterministic=True).sum(), (q, k, v))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_batch_does_not_change_a_sequence():
    """A sequence gets the same numbers alone and in a batch, to the last rounding of fp32."""
    q, k, v = (randn(4, 37, 4, 32, dtype=torch.float32) for _ in range(3))
    together = fa2.flash_attn_func(q, k, v, causal=True)
    for b in range(4):
        alone = fa2.flash_attn_func(*(x[b : b + 1] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-6)
