"""Dropout: which entries fall and how many, that backward drops the same ones, and that the generator alone decides."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_attn_mps.frontends import fa2
from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

from . import oracle
from .layouts import randn, random_dout
from .pairwise import case_id, pairwise
from .rule import verify
from .test_dense import DTYPES, MASKS, alibi_slopes
from .test_varlen import cumulative

CASES = pairwise(
    lengths=[(64, 64), (7, 113), (113, 7), (1, 64), (130, 300)],
    dims=[(64, 64), (40, 72)],
    dtype=DTYPES,
    heads=[(3, 3), (4, 2), (4, 1)],
    mask=["none", "causal", "both", "causal-left"],
    softcap=[0.0, 1.5],
    alibi=[None, "BH"],
    dropout_p=[0.1, 0.5, 0.75],
)


def keep_of(s_dmask):
    """Kept entries are non-negative; a dropped zero is -0.0."""
    return ~torch.signbit(s_dmask)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients_use_the_mask_that_s_dmask_shows(case):
    (seqlen_q, seqlen_k), (dim, dim_v), (heads, heads_k) = case["lengths"], case["dims"], case["heads"]
    rules = {**MASKS[case["mask"]], "softcap": case["softcap"], "dropout_p": case["dropout_p"]}
    rules["alibi_slopes"] = alibi_slopes(case["alibi"], 2, heads)
    seen = {}

    def call(q, k, v):
        torch.manual_seed(11)
        result = flash_attn_func(q, k, v, return_attn_probs=True, **rules)
        seen["s_dmask"] = result[2]
        torch.rand(17)  # the backward pass must not depend on what the generator does meanwhile
        return result

    verify(
        call,
        lambda *qkv: oracle.dense(*qkv, keep=keep_of(seen["s_dmask"]), **rules),
        {
            "q": randn(2, seqlen_q, heads, dim, dtype=case["dtype"]),
            "k": randn(2, seqlen_k, heads_k, dim, dtype=case["dtype"]),
            "v": randn(2, seqlen_k, heads_k, dim_v, dtype=case["dtype"]),
        },
        dout=random_dout("contiguous"),
        dropout_p=case["dropout_p"],
    )


def test_s_dmask_holds_the_probabilities():
    q, k, v = (randn(2, s, h, 32, dtype=torch.float32) for s, h in ((20, 4), (30, 2), (30, 2)))
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 20, 30)
    torch.testing.assert_close(s_dmask.abs(), oracle.dense(q, k, v, causal=True).p, rtol=1e-4, atol=1e-6)
    assert (s_dmask < 0).any()
    assert (s_dmask > 0).any()


def test_varlen_uses_the_mask_that_s_dmask_shows():
    lengths_q, lengths_k = [5, 30, 0, 8], [12, 30, 4, 0]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    seen = {}

    def call(q, k, v):
        result = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 30, 30, dropout_p=0.4, causal=True, return_attn_probs=True)
        seen["s_dmask"] = result[2]
        return result

    verify(
        call,
        lambda *qkv: oracle.varlen(*qkv, cu_q, cu_k, keep=keep_of(seen["s_dmask"]), dropout_p=0.4, causal=True),
        {name: randn(n, h, 16, dtype=torch.float32) for name, n, h in (("q", 43, 4), ("k", 46, 2), ("v", 46, 2))},
        dout=random_dout("contiguous"),
        dropout_p=0.4,
    )
    assert seen["s_dmask"].shape == (4, 4, 30, 30)


@pytest.mark.parametrize("dropout_p", [0.05, 0.37, 0.8])
def test_drop_rate(dropout_p):
    q, k, v = (torch.zeros(2, 300, 4, 8) for _ in range(3))
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=dropout_p, return_attn_probs=True)
    dropped = ~keep_of(s_dmask)

    def within_five_sigma(sample, probability):
        sigma = math.sqrt(probability * (1 - probability) / sample.numel())
        return abs(sample.double().mean().item() - probability) < 5 * sigma

    assert within_five_sigma(dropped, dropout_p)
    for b in range(2):
        for h in range(4):
            assert within_five_sigma(dropped[b, h], dropout_p)
    assert (abs(dropped.double().mean((0, 1, 2)) - dropout_p) < 6 * math.sqrt(dropout_p * (1 - dropout_p) / 2400)).all()

    # Independent draws agree with this probability; a mask that repeats over batch, heads or blocks agrees always.
    agree = dropout_p**2 + (1 - dropout_p) ** 2
    assert within_five_sigma(dropped[0] == dropped[1], agree)
    for h in range(1, 4):
        assert within_five_sigma(dropped[:, 0] == dropped[:, h], agree)
    for shift in (1, 8, 16, 32, 64, 100, 128, 150, 200, 256):
        assert within_five_sigma(dropped[..., shift:, :] == dropped[..., :-shift, :], agree)
        assert within_five_sigma(dropped[..., shift:] == dropped[..., :-shift], agree)


def test_rows_of_distant_chunks_are_independent():
    """At a length that any tier splits into several chunks."""
    q, k, v = (torch.zeros(1, s, 1, 8) for s in (2500, 600, 600))
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    kept = keep_of(s_dmask)[0, 0]
    for shift in (128, 256, 512, 1024, 2048):
        assert abs((kept[shift:] == kept[:-shift]).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(
            (2500 - shift) * 600
        )
    assert len(torch.unique(kept, dim=0)) == 2500


def test_reproducible_from_the_seed():
    q, k, v = (randn(2, 50, 2, 16, dtype=torch.float32).requires_grad_() for _ in range(3))

    def run(seed):
        if seed is not None:
            torch.manual_seed(seed)
        out = flash_attn_func(q, k, v, dropout_p=0.3)
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))

    first, second, other, unseeded = run(1), run(1), run(2), run(None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(other[0], unseeded[0])


def test_return_attn_probs_changes_nothing():
    q, k, v = (randn(2, 50, 2, 16, dtype=torch.float32) for _ in range(3))
    torch.manual_seed(5)
    plain = flash_attn_func(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)[0], plain)


def test_drawing_nothing_without_dropout():
    q = randn(1, 9, 2, 16, dtype=torch.float32)
    state = torch.get_rng_state()
    flash_attn_func(q, q, q)
    assert torch.equal(torch.get_rng_state(), state)


def test_unbiased():
    """The mean over many masks is attention without dropout."""
    q, k, v = (randn(1, 16, 2, 8, dtype=torch.float32) for _ in range(3))
    expected = flash_attn_func(q, k, v, causal=True)
    many = torch.stack([flash_attn_func(q, k, v, dropout_p=0.25, causal=True) for _ in range(600)])
    sigma = many.std(0) / math.sqrt(600)
    assert ((many.mean(0) - expected).abs() < 5 * sigma + 1e-6).all()


def test_two_calls_in_one_graph():
    """Each call keeps its own mask until the backward pass."""
    q, k, v = (randn(1, 24, 2, 16, dtype=torch.float32).requires_grad_() for _ in range(3))
    one, _, mask_one = flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    two, _, mask_two = flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    assert not torch.equal(keep_of(mask_one), keep_of(mask_two))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true = sum(oracle.dense(*exact, keep=keep_of(mask), dropout_p=0.5).out for mask in (mask_one, mask_two))
    ours = torch.autograd.grad((one + two).square().sum(), (q, k, v))
    for mine, wanted in zip(ours, torch.autograd.grad(true.square().sum(), exact), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_activation_checkpointing(use_reentrant, dropout_p):
    """The recomputed forward pass draws the same mask, since checkpointing restores the generator."""
    qkv = randn(2, 40, 3, 2, 16, dtype=torch.float32).requires_grad_()

    def layer(x):
        return flash_attn_qkvpacked_func(x, dropout_p=dropout_p, causal=True).square()

    torch.manual_seed(3)
    direct = layer(qkv)
    (expected,) = torch.autograd.grad(direct.sum(), qkv)
    torch.manual_seed(3)
    again = checkpoint(layer, qkv, use_reentrant=use_reentrant)
    again.sum().backward()
    assert torch.equal(again, direct)
    torch.testing.assert_close(qkv.grad, expected)


def test_packed_functions_drop_like_the_others():
    q, k, v = randn(40, 3, 2, 16, dtype=torch.float32).unbind(1)
    cu, how = cumulative([30, 10]), {"dropout_p": 0.4, "causal": True}

    def seeded(function, *args):
        torch.manual_seed(9)
        return function(*args, **how)

    dense = [x.view(2, 20, 2, 16) for x in (q, k, v)]
    expected = seeded(flash_attn_func, *dense)
    assert not torch.equal(expected, flash_attn_func(*dense, causal=True))
    assert torch.equal(seeded(flash_attn_qkvpacked_func, torch.stack(dense, 2)), expected)
    assert torch.equal(seeded(fa2.flash_attn_kvpacked_func, dense[0], torch.stack(dense[1:], 2)), expected)
    expected = seeded(flash_attn_varlen_func, q, k, v, cu, cu, 30, 30)
    assert not torch.equal(expected, flash_attn_varlen_func(q, k, v, cu, cu, 30, 30, causal=True))
    qkv, kv = torch.stack((q, k, v), 1), torch.stack((k, v), 1)
    assert torch.equal(seeded(fa2.flash_attn_varlen_qkvpacked_func, qkv, cu, 30), expected)
    assert torch.equal(seeded(fa2.flash_attn_varlen_kvpacked_func, q, kv, cu, cu, 30, 30), expected)
