"""The oracle itself: against masks drawn by hand, PyTorch's math, and properties that need no second implementation."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from . import oracle
from .pairwise import pairwise

# (seqlen_q, seqlen_k, causal, window_size, rows of what each query sees)
DRAWN = [
    (2, 5, True, (-1, -1), ["11110", "11111"]),
    (5, 2, True, (-1, -1), ["00", "00", "00", "10", "11"]),
    (3, 3, False, (0, 0), ["100", "010", "001"]),
    (3, 5, False, (1, -1), ["01111", "00111", "00011"]),
    (3, 5, False, (-1, 1), ["11110", "11111", "11111"]),
    (4, 4, False, (1, 2), ["1110", "1111", "0111", "0011"]),
    (4, 4, True, (1, 2), ["1000", "1100", "0110", "0011"]),
    (4, 2, False, (0, 0), ["00", "00", "10", "01"]),
]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "causal", "window_size", "drawn"), DRAWN)
def test_masks(seqlen_q, seqlen_k, causal, window_size, drawn):
    q, k, v = (torch.randn(1, s, 2, 4).double() for s in (seqlen_q, seqlen_k, seqlen_k))
    out, lse, p = oracle.dense(q, k, v, causal=causal, window_size=window_size)
    seen = torch.tensor([[letter == "1" for letter in row] for row in drawn])
    assert torch.equal(p[0, 0] > 0, seen)
    assert torch.equal(torch.isneginf(lse[0, 1]), ~seen.any(-1))
    assert torch.equal((out[0, :, 0] == 0).all(-1), ~seen.any(-1))


@pytest.mark.parametrize("causal", [False, True])
def test_against_pytorch_math(causal):
    q, k, v = torch.randn(2, 9, 4, 8).double(), torch.randn(2, 9, 2, 8).double(), torch.randn(2, 9, 2, 8).double()
    mine = oracle.dense(q, k, v, causal=causal, softmax_scale=0.3).out
    theirs = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(mine, theirs.transpose(1, 2))


def test_softcap_alibi_and_lse_by_hand():
    q, k, v = (
        torch.tensor([[[[3.0]]]]).double(),
        torch.tensor([[[[1.0]], [[2.0]]]]).double(),
        torch.ones(1, 2, 1, 1).double(),
    )
    _, lse, p = oracle.dense(q, k, v, softmax_scale=1.0, softcap=2.0, alibi_slopes=torch.tensor([0.5]))
    scores = [2 * math.tanh(3 / 2) - 0.5, 2 * math.tanh(6 / 2)]
    assert lse.item() == pytest.approx(math.log(math.exp(scores[0]) + math.exp(scores[1])))
    assert p[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(scores[1] - scores[0])))


def test_gradients_against_finite_differences():
    q, k, v = (torch.randn(1, s, h, 3).double().requires_grad_() for s, h in ((4, 2), (5, 1), (5, 1)))
    how = {"causal": True, "window_size": (2, 0), "softcap": 1.5, "alibi_slopes": torch.tensor([0.1, 0.2])}
    assert torch.autograd.gradcheck(lambda *x: oracle.dense(*x, **how).out, (q, k, v))


def test_varlen_and_pages_equal_dense_sequences():
    k, v = torch.randn(4, 3, 1, 8).double(), torch.randn(4, 3, 1, 8).double()
    q = torch.randn(5, 2, 8).double()
    pages = torch.tensor([[2, 0, 3], [1, 3, 0]])
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 7, 10])
    out = oracle.varlen(q, k, v, cu_q, cu_k, block_table=pages, causal=True).out
    for b, (begin, end, length) in enumerate([(0, 2, 7), (2, 5, 3)]):
        keys = k[pages[b]].reshape(9, 1, 8)[:length]
        values = v[pages[b]].reshape(9, 1, 8)[:length]
        alone = oracle.dense(q[None, begin:end], keys[None], values[None], causal=True).out[0]
        torch.testing.assert_close(out[begin:end], alone)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_preserves_relative_angles(interleaved):
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.1, 0.01]).double()
    x, y = torch.randn(1, 1, 8).double(), torch.randn(1, 1, 8).double()

    def product(i, j):
        turned = [oracle.rotate(z, angles.cos(), angles.sin(), [at], interleaved) for z, at in ((x, i), (y, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(3, 5), product(7, 9))
    torch.testing.assert_close(product(0, 0), (x * y).sum())
    assert abs(product(3, 5) - product(3, 6)) > 1e-6


def test_pairwise_covers_every_pair():
    factors = {"a": [1, 2, 3], "b": ["x", "y"], "c": [None, True, False, 0.5], "d": [7]}
    cases = pairwise(**factors)
    for one, other in combinations(factors, 2):
        assert {(c[one], c[other]) for c in cases} == {(i, j) for i in factors[one] for j in factors[other]}
    assert len(cases) < 3 * 2 * 4


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_against_pytorch_math(kind):
    q, k, v = torch.randn(1, 9, 4, 8).double(), torch.randn(1, 7, 2, 8).double(), torch.randn(1, 7, 2, 8).double()
    mask = torch.randn(4, 9, 7).double()
    mask = mask > -0.5 if kind == "bool" else mask
    mine, _, _ = oracle.one_sequence(q[0], k[0], v[0], mask=mask)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(mine, theirs[0].transpose(0, 1))


def test_a_sink_is_a_key_with_that_score_and_no_value():
    q, k, v = torch.randn(5, 2, 4).double(), torch.randn(6, 2, 4).double(), torch.randn(6, 2, 4).double()
    sinks = torch.tensor([0.7, -1.2])
    out, lse, p = oracle.one_sequence(q, k, v, causal=True, sinks=sinks)
    no_more = F.pad(v, (0, 0, 0, 0, 1, 0))
    bias = torch.cat([sinks.double()[:, None, None].expand(2, 5, 1), torch.zeros(2, 5, 6).double()], -1)
    extra = oracle.one_sequence(q, F.pad(k, (0, 0, 0, 0, 1, 0)), no_more, causal=True, mask=bias)
    torch.testing.assert_close((out, lse, p), (extra[0], extra[1], extra[2][..., 1:]))
    blind, lse, _ = oracle.one_sequence(q, k, v, mask=torch.zeros(2, 5, 6, dtype=torch.bool), sinks=sinks)
    assert (blind == 0).all()
    torch.testing.assert_close(lse, sinks.double()[:, None].expand(2, 5))
