"""Rows of memory that no sequence has (Dao-AILab/flash-attention#1228): zeros, log-sum-exp -inf, no gradient."""

import contextlib
import itertools

import pytest
import torch

from flash_attn_mps.frontends import fa2, fa3
from tests.attention import oracle

LENGTHS = {  # of queries and of keys, and the rows of memory behind the last sequence
    "two sequences": ([3, 9], [7, 20], 5, 8),
    "many rows behind": ([1], [4], 300, 70),
    "a last sequence of no length": ([8, 0], [8, 0], 11, 1),
    "no sequence": ([], [], 9, 9),
}


@contextlib.contextmanager
def unwritten_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(tier, read_by, lengths, causal):
    lengths_q, lengths_k, behind_q, behind_k = LENGTHS[lengths]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q = torch.randn(sum(lengths_q) + behind_q, 2, 16)
    k, v = torch.randn(2, sum(lengths_k) + behind_k, 1, 16)
    q[sum(lengths_q) :], k[sum(lengths_k) :], v[sum(lengths_k) :] = torch.nan, torch.nan, torch.nan
    longest = max(lengths_q, default=3), max(lengths_k, default=3)
    if not lengths_q and tier not in ("auto", "torch", "M5"):
        with pytest.raises(NotImplementedError, match="there are no scores"):
            fa2.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest)
        return
    with unwritten_memory_is_nan():
        out, lse, _ = fa2.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=causal, return_attn_probs=True)
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(cu_q[b], cu_q[b] + n), slice(cu_k[b], cu_k[b] + m)
        exact = oracle.dense(q[None, rows].double(), k[None, keys].double(), v[None, keys].double(), causal=causal)
        torch.testing.assert_close(out[None, rows].double(), exact.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[None, :, rows].double(), exact.lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[sum(lengths_q) :], torch.zeros(behind_q, 2, 16))
    assert torch.isneginf(lse[:, sum(lengths_q) :]).all()


def test_gradients(tier, read_by):
    cu = cumulative([3, 9])
    q = torch.randn(17, 2, 16)
    k, v = torch.randn(2, 17, 1, 16)
    grads = []
    for rows in (17, 12):
        leaves = [x[:rows].clone().requires_grad_() for x in (q, k, v)]
        out = fa2.flash_attn_varlen_func(*leaves, cu, cu, 9, 9, causal=True)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for padded, exact in zip(*grads, strict=True):
        torch.testing.assert_close(padded[:12], exact, rtol=1e-4, atol=1e-5)
        assert torch.equal(padded[12:], torch.zeros_like(padded[12:]))


def test_rows_that_seqused_leaves_out(tier, read_by):
    cu, used = cumulative([6, 9]), torch.tensor([4, 0], dtype=torch.int32)
    q = torch.randn(20, 2, 16)
    k, v = torch.randn(2, 20, 2, 16)
    with unwritten_memory_is_nan():
        out, lse = fa3.flash_attn_varlen_func(
            q, k, v, cu, cu, 9, 9, seqused_q=used, seqused_k=used, return_attn_probs=True
        )
    exact = oracle.dense(*(x[None, :4].double() for x in (q, k, v)))
    torch.testing.assert_close(out[None, :4].double(), exact.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[4:], torch.zeros(16, 2, 16))
    assert torch.isneginf(lse[:, 4:]).all()


def test_packed_queries_of_a_cache(tier, read_by):
    cu, used = cumulative([2, 3]), torch.tensor([7, 11], dtype=torch.int32)
    q = torch.randn(9, 2, 16)
    k, v = torch.randn(2, 2, 12, 1, 16)
    with unwritten_memory_is_nan():
        out, lse, *_ = fa3.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=used, cu_seqlens_q=cu, max_seqlen_q=3, causal=True, return_softmax_lse=True
        )
    for b, (rows, keys) in enumerate(((slice(0, 2), 7), (slice(2, 5), 11))):
        qkv = (q[None, rows], k[b : b + 1, :keys], v[b : b + 1, :keys])
        exact = oracle.dense(*(x.double() for x in qkv), causal=True)
        torch.testing.assert_close(out[None, rows].double(), exact.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[5:], torch.zeros(4, 2, 16))
    assert torch.isneginf(lse[:, 5:]).all()


@pytest.mark.parametrize("lengths", [[2, 3], [0, 4], [3, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_new_rows_of_a_cache(read_by, lengths, paged):
    """Rows behind the last sequence are not appended, and nothing else is touched. (By no tier: it comes before.)"""
    cu, used = cumulative(lengths), torch.tensor([5, 9], dtype=torch.int32)
    q, new = torch.randn(2, 1, 2, 16), torch.randn(2, 9, 1, 16)
    caches = torch.randn(2, 2, 16, 1, 16)
    expected = caches.clone()
    for b, (first, n) in enumerate(zip(cu.tolist(), lengths, strict=False)):
        expected[:, b, used[b] : used[b] + n] = new[:, first : first + n]
    how = {"cache_seqlens": used, "cu_seqlens_k_new": cu, "causal": True}
    given = caches.clone()
    if paged:  # entries of the table that hold no key may be anything
        given = given.view(2, 8, 4, 1, 16)
        how["page_table"] = torch.arange(8, dtype=torch.int32).view(2, 4)
    out = fa3.flash_attn_with_kvcache(q, given[0], given[1], new[0], new[1], **how)
    assert torch.equal(given.view_as(expected), expected)
    for b in range(2):
        keys = slice(0, int(used[b]) + lengths[b])
        qkv = (q[b : b + 1], expected[0, b : b + 1, keys], expected[1, b : b + 1, keys])
        exact = oracle.dense(*(x.double() for x in qkv), causal=True)
        torch.testing.assert_close(out[b : b + 1].double(), exact.out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [fa2.flash_attn_varlen_func, fa3.flash_attn_varlen_func])
def test_more_rows_than_there_are_is_an_error(function):
    q = torch.randn(9, 2, 16)
    with pytest.raises(ValueError, match="cu_seqlens_q: got a last value of 10; accepted: at most 9"):
        function(q, q, q, cumulative([10]), cumulative([9]), 10, 9)
