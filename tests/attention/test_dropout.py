"""Dropout: which entries fall and how many, that backward drops the same ones, and that the generator alone decides."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import philox as generator
from flash_attn_mps.frontends import fa2, fa2_private
from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn_mps.tiers import score_blocks

from . import oracle, philox
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


# Published with the generator (Random123, kat_vectors): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_generator_gives_the_published_words(counter, key, words):
    assert tuple(map(int, generator.philox4x32(tuple(map(torch.tensor, counter)), key))) == words
    assert tuple(map(int, philox.philox4x32(counter, (key % 2**32, key // 2**32)))) == words


@pytest.mark.parametrize("seed", [0, 5, (123 << 40) + 77, 2**63 - 2, -3])
def test_a_part_of_the_mask_is_that_part_of_the_whole(seed):
    whole = philox.keep(seed, 0.3, 2, 3, 41, 70)
    heads = torch.arange(6).view(2, 3)
    for queries, keys in itertools.product([(0, 41), (7, 20)], [(0, 70), (8, 24), (13, 14), (5, 69), (64, 70)]):
        part = generator.keep(seed, 0.3, heads, queries, keys)
        assert torch.equal(part, whole[..., slice(*queries), slice(*keys)])


@pytest.mark.parametrize("dropout_p", [1e-9, 2**-16, 0.1, 0.99999999])
def test_the_probability_is_a_multiple_of_2_to_the_minus_16(dropout_p):
    threshold = generator.threshold(dropout_p)
    assert 0 <= threshold < 2**16
    assert abs(threshold / 2**16 - dropout_p) <= 2**-16


@pytest.mark.parametrize("scores", [1 << 22, 1000], ids=["whole", "blocks"])
@pytest.mark.parametrize("window_size", [(-1, -1), (9, 4)])
def test_the_mask_depends_on_seed_sequence_head_query_and_key_alone(scores, window_size, monkeypatch):
    """Not on blocks, on what is hidden, or on how the sequences lie in memory."""
    monkeypatch.setattr(score_blocks, "SCORES", scores)
    q, k, v = (torch.zeros(3, s, h, 8) for s, h in ((37, 4), (51, 2), (51, 2)))
    rules = (0.4, 1.0, False, *window_size, 0.0, None)
    *_, dense, rng_state = fa2_private._flash_attn_forward(q, k, v, *rules, True)
    expected = philox.keep(int(rng_state[0]), 0.4, 3, 4, 37, 51)
    seen = dense != 0
    assert torch.equal(keep_of(dense)[seen], expected[seen])

    lengths_q, lengths_k = [37, 3, 20], [51, 40, 20]
    packed = [
        torch.cat([x[b, :n] for b, n in enumerate(lengths)])
        for x, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k))
    ]
    torch.manual_seed(4)
    cu = cumulative(lengths_q), cumulative(lengths_k)
    *_, varlen, rng_state = fa2_private._flash_attn_varlen_forward(*packed, *cu, 37, 51, *rules, True)
    expected = philox.keep(int(rng_state[0]), 0.4, 3, 4, 37, 51)
    seen = varlen != 0
    assert torch.equal(keep_of(varlen)[seen], expected[seen])


@pytest.mark.parametrize("dropout_p", [0.05, 0.37, 0.8])
def test_keep_rate(dropout_p):
    """In all, of each head, and of its rows and columns: 4,800 of them, so another seed may go beyond four sigma."""
    kept = generator.keep(7, dropout_p, torch.arange(8).view(2, 4), (0, 300), (0, 304)).double()
    for rates, draws in (
        (kept.mean(), kept.numel()),
        (kept.mean((-2, -1)), 300 * 304),
        (kept.mean(-1), 304),
        (kept.mean(-2), 300),
    ):
        sigma = math.sqrt(dropout_p * (1 - dropout_p) / draws)
        assert (rates - (1 - dropout_p)).abs().max() < 4 * sigma


def chi_square(*bits):
    """Of the patterns of simultaneous draws against independence: normalised, about a standard normal number."""
    bits = [b.flatten().long() for b in bits]
    patterns = sum(b << n for n, b in enumerate(bits))
    counts = torch.bincount(patterns, minlength=1 << len(bits)).double()
    expected = torch.ones(1, dtype=torch.float64)
    for b in bits:  # the rates are taken from the draws: a degree of freedom each
        rate = b.double().mean()
        expected = torch.cat([expected * (1 - rate), expected * rate])
    expected *= len(patterns)
    degrees = len(counts) - 1 - len(bits)
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_neighbours_are_independent(dropout_p):
    """Over two million draws: of keys, queries, heads, sequences and seeds, beside each other and further apart."""
    kept = generator.keep(13, dropout_p, torch.arange(8).view(2, 4), (0, 520), (0, 512))
    draws = {f"keys+{n}": (kept[..., n:], kept[..., :-n]) for n in (1, 2, 4, 7, 8, 16, 32, 64, 128, 256)}
    draws |= {f"queries+{n}": (kept[..., n:, :], kept[..., :-n, :]) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    draws |= {f"heads+{n}": (kept[:, n:], kept[:, :-n]) for n in (1, 2, 3)}
    draws["sequences"] = kept[0], kept[1]
    draws["four keys"] = tuple(kept[..., n::4] for n in range(4))
    draws["a square"] = kept[..., :-1, :-1], kept[..., 1:, :-1], kept[..., :-1, 1:], kept[..., 1:, 1:]
    for seed in (14, 13 + 2**32, 13 + 2**62):
        draws[f"seed {seed}"] = kept, generator.keep(seed, dropout_p, torch.arange(8).view(2, 4), (0, 520), (0, 512))
    off = {name: chi_square(*bits) for name, bits in draws.items()}
    assert max(off.values()) < 5, off


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
