"""Gradients composed of matrix products by the torch tier, where the kernels would be slower: when, and who says so."""

import pytest
import torch

from flash_attn_mps import tiers, trace
from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.tiers import reference
from flash_attn_mps.tiers.metal import composed, gpu, store, tune, variants
from flash_attn_mps.tiers.metal.composed import COMPOSED, FUSED, WAYS


@pytest.fixture(autouse=True)
def _anew():
    variants.forget()
    yield
    variants.forget()


def problem(length=520, head_dim=136, **how):
    q = torch.randn(1, length, 1, head_dim)
    return dense(q, q, q, CallOptions(**{"want_lse": True, **how}))


def first(p):
    """The tier that computes the gradients."""
    return next(name for name, reasons in tiers.explain_gradients(p).items() if not reasons)


@pytest.mark.parametrize(
    ("how", "tier"),
    [
        ({}, "torch"),
        ({"causal": True}, "torch"),
        ({"head_dim": 128}, "simdgroup"),
        ({"length": 512}, "simdgroup"),
        ({"softcap": 2.0}, "simdgroup"),
        ({"window_size": (100, 0)}, "simdgroup"),
        ({"dropout_p": 0.1}, "simdgroup"),
    ],
    ids=str,
)
def test_the_default(how, tier):
    """Plain calls that are wide and not short: what else the torch tier computes takes passes over the scores."""
    assert first(problem(**how)) == tier


def test_it_can_be_forced(monkeypatch):
    monkeypatch.setenv(WAYS.variable, FUSED)
    assert first(problem()) == "simdgroup"
    variants.forget()
    monkeypatch.setenv(WAYS.variable, COMPOSED)
    assert first(problem(head_dim=64)) == "torch"
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
    assert first(problem(head_dim=64)) == "simdgroup"


def test_what_tune_found_decides(monkeypatch):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")
    narrow, wide = problem(head_dim=64), problem()
    store.save({store.key_of(narrow, WAYS): store.Winner(COMPOSED, 1e-3, 2e-3)})
    store.save({store.key_of(wide, WAYS): store.Winner(FUSED, 1e-3, 2e-3)})
    try:
        variants.forget()
        assert (first(narrow), first(wide)) == ("torch", "simdgroup")
    finally:
        store.path().unlink()


def test_the_trace_says_why(monkeypatch):
    for counts in ("calls", "gradients", "refusals"):
        monkeypatch.setattr(trace, counts, trace.Counter())
    monkeypatch.setattr(trace, "enabled", True)
    p, needed = problem(causal=True), frozenset("qkv")
    result, dout = reference.run(p), torch.randn(p.out_shape)
    found = tiers.gradients(p, result.out, result.lse, dout, None, needed)
    expected = reference.backward(p, result.out, result.lse, dout, None, needed)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert [call.tier for call in trace.gradients] == ["torch"]
    assert list(trace.refusals) == [trace.Refusal("simdgroup", "backward", composed.WHY)]


def test_tune_times_both_ways_and_compares_them():
    timed = []

    def clock(call, times):
        way = call.args[2]
        timed.append(way)
        return {FUSED: 2e-3, COMPOSED: 1e-3}[way]

    key = store.Key(WAYS.entry, "float32", 16, 16, "short", "causal")
    outcome = tune.tune(key, WAYS, "cpu", clock, candidates=tune.candidates(key, WAYS))
    assert outcome == tune.Outcome(key, store.Winner(COMPOSED, 1e-3, 2e-3), 2, {})
    assert set(timed) == {FUSED, COMPOSED}

    def wrong(trial, kernel, way):
        grads = tune.launched(trial, kernel, way)
        return (*grads[:2], 1.1 * grads[2]) if way == COMPOSED else grads

    outcome = tune.tune(key, WAYS, "cpu", clock, candidates=tune.candidates(key, WAYS), run=wrong)
    assert outcome.winner.variant == FUSED
    assert "is off by" in outcome.refused[COMPOSED]
