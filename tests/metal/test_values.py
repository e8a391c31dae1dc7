"""Values that are not finite or at the limits of a dtype: they reach the queries that see them, and no others."""

import math

import pytest
import torch

from flash_attn_mps.tiers.metal import launch, scalar, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import observe
from tests.attention.rule import assert_lse

from .calls import Spec, draw

TILED = [
    (simdgroup.FORWARD, Variant(8, 2, 8, False)),
    (simdgroup.FORWARD, Variant(16, 2, 16, True)),
]
KERNELS = [*TILED, (scalar.FORWARD, scalar.VARIANT)]
DIM = 16


def run(call, kernel):
    with observe():
        return launch.run(call.problem, *kernel)


def sees(spec, call):
    """(heads, seqlen_q, seqlen_k): which keys a query sees."""
    (seqlen_q, seqlen_k), (left, right) = spec.lengths[0], spec.window
    distance = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)
    seen = torch.ones(spec.heads[0], seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    if call.problem.mask is not None:
        mask = call.problem.mask[0]
        seen &= mask if mask.dtype == torch.bool else mask > -math.inf
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize(
    "how",
    [{}, {"window": (-1, 0)}, {"window": (9, 4)}, {"mask": "bool"}, {"mask": "same", "window": (-1, 0)}],
    ids=["none", "causal", "window", "bool", "added"],
)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_what_a_query_sees_reaches_it_and_no_other(kernel, how, operand, value):
    """One element is not finite: of query 20, key 25, or column 3 of value 25. What does not depend on it is right."""
    spec = Spec([(33, 40)], (DIM, DIM), torch.float16, heads=(2, 1), **how)
    call = draw(spec)
    p, at = call.problem, 20 if operand == "q" else 25
    clean = run(call, kernel).out
    getattr(p, operand)[0, at, 0, 3] = value
    out = run(call, kernel).out
    seen = sees(spec, call)
    reached = torch.zeros(33, 2, DIM, dtype=torch.bool)
    if operand == "q":
        reached[at, 0] = seen[0, at].any()
    elif operand == "k":
        reached |= seen[:, :, at].T[..., None]
    else:
        reached[..., 3] = seen[:, :, at].T
    assert torch.equal(out[0][~reached], clean[0][~reached])
    if math.isnan(value):
        assert out[0][reached].isnan().all()
    elif operand == "v":
        assert not out[0][reached].isfinite().any()
    # An infinite q or k makes scores of both infinities: those of -inf hide their key, those of +inf give NaN.


def test_an_infinite_score_hides_or_spoils():
    """k = -inf where q > 0 is a score of -inf: as if the key were masked. k = +inf is a score of +inf: NaN."""
    spec = Spec([(4, 20)], (8, 8), torch.float32, heads=(1, 1))
    for kernel in KERNELS:
        call = draw(spec)
        p = call.problem
        p.q.abs_()
        p.k[0, 7] = -math.inf
        result = run(call, kernel)
        assert result.out.isfinite().all()
        (s,) = call.sequences
        keep = torch.arange(20) != 7
        s.k, s.v = s.k[keep], s.v[keep]
        s.q = p.q[0]
        call.check(result)
        p.k[0, 7] = math.inf
        assert run(call, kernel).out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_scores_beyond_the_range_of_the_dtype(kernel, dtype):
    """q k = 16 * 70 * 70 = 78400 is more than fp16 holds, and exp of it more than fp32."""
    call = draw(Spec([(9, 33)], (DIM, DIM), dtype, scale=1.0))
    p = call.problem
    p.q.fill_(70.0)
    p.k.fill_(70.0)
    p.k[:, 1::2] = -70.0
    result = run(call, kernel)
    expected = p.v[:, ::2].double().mean(1, keepdim=True).repeat_interleave(2, 2).expand(result.out.shape)
    torch.testing.assert_close(result.out.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(result.lse.double(), torch.full((1, 4, 9), 78400 + math.log(17)).double())


@pytest.mark.parametrize("softcap", [0.05, 50.0, 1e4])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_softcap_is_exact_far_below_and_far_above_the_cap(kernel, softcap):
    call = draw(Spec([(33, 70)], (DIM, DIM), torch.float32, softcap=softcap))
    call.check(run(call, kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_sink_of_minus_infinity_is_none(kernel):
    spec = Spec([(9, 5)], (DIM, DIM), torch.float32, window=(-1, 0), sinks=True)
    call = draw(spec)
    call.problem.sinks.fill_(-math.inf)
    for s in call.sequences:
        s.how["sinks"] = None
    result = run(call, kernel)
    call.check(result)
    assert torch.isneginf(result.lse[..., :4]).all()


@pytest.mark.parametrize("sink", [-200.0, 200.0])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_sinks_far_from_the_scores(kernel, sink):
    call = draw(Spec([(9, 20)], (DIM, DIM), torch.float32, sinks=True))
    call.problem.sinks.fill_(sink)
    result = run(call, kernel)
    call.check(result)
    assert_lse(result.lse, call.expected(torch.float64).lse)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("mask", ["bool", "same"])
def test_rows_that_see_nothing(kernel, mask):
    """Zeros and -inf, not NaN, where the mask hides every key, and where causality does."""
    call = draw(Spec([(40, 20)], (DIM, DIM), torch.float16, window=(-1, 0), mask=mask))
    result = run(call, kernel)
    call.check(result)
    assert (result.out[:, :20] == 0).all()
    assert torch.isneginf(result.lse[..., :20]).all()
    assert torch.isneginf(result.lse[..., 1::4]).all()  # rows that the mask blinds
