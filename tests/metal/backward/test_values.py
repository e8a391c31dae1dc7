"""Values at limits: large scores, keys that are elsewhere, what nobody sees; bits that do not depend on a variant."""

import math

import pytest
import torch

from flash_attn_mps.tiers.metal.backward_kernels import Variant
from metal_host import observe
from tests.attention.rule import same_bits
from tests.metal.calls import Spec, draw

from .gradients import Backward

DIM = 16
PLAIN = Variant(8, 2, 8, False, True, False)
VARIANTS = [
    PLAIN,
    Variant(16, 2, 8, False, False, False),
    Variant(8, 1, 16, False, False, True),
    Variant(8, 4, 32, True, True, False),
    Variant(16, 2, 16, True, False, True),
]


def run(call, queries=PLAIN, keys=PLAIN, **how):
    with observe():
        return call.run(queries, keys, **how)


def equal(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def tied(dtype, spec):
    """Scores of -256 to 983040, exact in float32: of a query every fourth key has the largest."""
    call = draw(spec)
    p = call.problem
    for t in (p.q, p.k):
        t.zero_()
    p.q[..., 0] = 256.0
    p.k[..., 0] = (256.0 * (torch.arange(p.k.shape[1]) % 4 * 5))[None, :, None]
    p.k[:, ::7, :, 0] = -1.0
    for s in call.sequences:
        s.q, s.k = p.q[s.place], p.k[s.place_k]
    return call


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("how", [{}, {"window": (-1, 0)}, {"sinks": True}, {"alibi": "H"}, {"scale": -1.0}], ids=str)
def test_scores_of_a_million(how, dtype):
    """Beside 1e6 a log-sum-exp does not hold the logarithm of how many keys have the largest score."""
    call = Backward(tied(dtype, Spec([(20, 40)] * 2, (DIM, DIM), dtype, heads=(2, 1), **{"scale": 1.0, **how})))
    assert call.lse[0, 0, -1].abs() > (9e5 if how.get("scale", 1.0) > 0 else 200)
    exact = call.expected(torch.float64)
    # ds is rounded once and multiplied with k of 3840 at most, or q of 256; plain fp16 overflows.
    allowed = {
        name: 16 * torch.finfo(dtype).eps * factor for name, factor in {"q": 3840.0, "k": 256.0, "v": 1.0}.items()
    }
    got = run(call)
    for name, most in allowed.items():
        assert (got[name].double() - exact[name]).abs().max().item() <= most, name


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_keys_that_are_elsewhere(size):
    """Ring attention: a log-sum-exp of all keys, whoever has them; gradients of the halves are those of the whole."""
    spec = Spec([(40, 48)], (DIM, DIM), torch.float32, heads=(2, 1), std=(size, size, 1.0))
    whole = Backward(draw(spec))
    expected = whole.expected(torch.float64)
    halves = []
    for part in (slice(0, 16), slice(16, 48)):
        half = Backward(draw(spec))
        p, of = half.call.problem, whole.call.problem
        p.q, p.k, p.v, p.max_seqlen_k = of.q, of.k[:, part], of.v[:, part], part.stop - part.start
        half.out, half.lse, half.dout = whole.out, whole.lse, whole.dout
        halves.append(run(half))
    got = {
        "q": halves[0]["q"] + halves[1]["q"],
        "k": torch.cat([half["k"] for half in halves], 1),
        "v": torch.cat([half["v"] for half in halves], 1),
    }
    plain = whole.expected(torch.float32)
    for name, grad in got.items():
        error, allowed = ((x.double() - expected[name]).abs().max().item() for x in (grad, plain[name]))
        assert error <= 2 * allowed + 1e-5 * size, name


HIDING = [
    {"window": (4, 2)},  # the first 18 queries see no key
    {"mask": "float32", "window": (-1, 0)},
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("how", HIDING, ids=str)
def test_what_nobody_sees_does_not_matter(how, value):
    """Neither a query that sees no key, with its gradient, nor a key that no query sees: gradients of zero, no NaN."""
    spec = Spec([(60, 40)] * 2, (DIM, 24), torch.float16, heads=(3, 1), poison=0.0, **how)
    call = Backward(draw(spec))
    p = call.call.problem
    blind = call.lse.isneginf().transpose(1, 2)  # (batch, seqlen_q, heads)
    assert blind.any() and not blind.all()
    for keys in (PLAIN, VARIANTS[-1]._replace(split=True)):
        clean = run(call, keys, keys)
        q, dout = p.q.clone(), call.dout.clone()
        p.q[blind], call.dout[blind] = value, value
        got = run(call, keys, keys)
        p.q, call.dout = q, dout
        assert equal(got, clean)
        assert (got["q"][blind] == 0).all()
    call.check(clean)
    unseen = (call.expected(torch.float64)["v"] == 0).all(-1)
    assert (got["k"][unseen] == 0).all() and (got["v"][unseen] == 0).all()


@pytest.mark.parametrize("operand", ["k", "v", "q", "dout"])
def test_what_is_not_finite_shows_where_it_is_seen(operand):
    """Query 20 or key 20 of 40, under a causal mask: NaN for whoever meets it, and the same bits for all others."""
    call = Backward(draw(Spec([(40, 40)], (DIM, DIM), torch.float16, heads=(2, 1), window=(-1, 0))))
    p = call.call.problem
    clean = run(call)
    tensor = call.dout if operand == "dout" else getattr(p, operand)
    tensor[0, 20, 0, 3] = math.nan
    if operand != "dout":  # what the forward pass makes of it
        rows = slice(20, 21) if operand == "q" else slice(20, 40)
        heads = slice(0, 1) if operand == "q" else slice(0, 2)
        call.out[:, rows, heads], call.lse[:, heads, rows] = math.nan, math.nan
    got = run(call)
    if operand in ("q", "dout"):
        assert got["q"][0, 20, 0].isnan().all()
        assert same_bits(got["q"][0, :20], clean["q"][0, :20]) and same_bits(got["q"][0, 21:], clean["q"][0, 21:])
        assert got["k"][0, :21].isnan().all()
        assert got["v"][0, :21].isnan().any(-1).all()
        assert same_bits(got["k"][0, 24:], clean["k"][0, 24:]) and same_bits(got["v"][0, 24:], clean["v"][0, 24:])
    else:
        assert got["q"][0, 20:].isnan().all()
        assert same_bits(got["q"][0, :20], clean["q"][0, :20])
        assert got["k"][0, 20].isnan().all()


def test_no_bit_depends_on_the_variant(rules=({"window": (-1, 0), "dropout_p": 0.3},), variants=VARIANTS[3:]):
    for how in rules:
        call = Backward(draw(Spec([(70, 50)] * 2, (40, 24), torch.float16, heads=(2, 1), **how)), dlse=True)
        expected = run(call)
        call.check(expected)
        for variant in variants:
            for split in (False, True):
                assert equal(run(call, variant, variant._replace(split=split)), expected), variant


@pytest.mark.metal_full
def test_no_bit_depends_on_any_variant():
    test_no_bit_depends_on_the_variant(({}, {"window": (-1, 0)}, {"dropout_p": 0.3}), VARIANTS)


def test_equal_calls_give_equal_bits():
    """In whatever order threadgroups and simdgroups run."""
    call = Backward(draw(Spec([(70, 50)] * 2, (40, 24), torch.float32, heads=(4, 2), window=(9, 3), sinks=True)))
    results = []
    for seed in range(3):
        with observe(seed=seed):
            results.append(call.run(VARIANTS[-1], VARIANTS[-1]))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_a_threadgroup_for_each_query_head_gives_the_same_sums():
    """In float32, rounded once: dk and dv of the heads apart may not be rounded before they are added."""
    call = Backward(draw(Spec([(70, 50)] * 2, (40, 20), torch.float16, heads=(6, 1))))
    apart, together = run(call, each_head=True), run(call)
    for name in ("k", "v"):
        assert apart[name].dtype == torch.float16
        torch.testing.assert_close(apart[name], together[name], rtol=2e-3, atol=2e-3)
    call.check(apart)
