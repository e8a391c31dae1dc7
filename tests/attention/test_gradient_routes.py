"""However a program comes to gradients, the tier that is asked first and serves them computes them."""

import pytest
import torch

from flash_attn_mps import sdpa, trace
from flash_attn_mps.tiers import reference
from flash_attn_mps.tiers.tier import LSE_GRADIENT
from tests.replaced_tiers import replace_tier

from . import oracle
from .gradient_routes import BACKWARD_PASSES, ROUTES, instead_of_torchs
from .layouts import randn


@pytest.fixture
def first(monkeypatch):
    """The passes that the first of the tiers ran, which serves everything here, as the kernels do on a Mac."""
    passes = []

    def run(p):
        passes.append("forward")
        return reference.run(p)

    def backward(*arguments):
        passes.append("backward")
        return reference.backward(*arguments)

    everything = {"serves": reference.SERVES, "serves_backward": reference.SERVES | {LSE_GRADIENT}}
    replace_tier(monkeypatch, "simdgroup", limits=lambda p: [], run=run, backward=backward, **everything)
    for counts in ("calls", "gradients", "refusals"):
        monkeypatch.setattr(trace, counts, trace.Counter())
    monkeypatch.setattr(trace, "enabled", True)
    instead_of_torchs(monkeypatch)
    yield passes
    monkeypatch.undo()
    sdpa.reset()


@pytest.mark.parametrize("name", ROUTES)
def test_the_first_tier_computes_gradients(name, first):
    q, dout = randn(2, 12, 4, 16, dtype=torch.float32), randn(2, 12, 4, 16, dtype=torch.float32)
    k, v = (randn(2, 12, 2, 16, dtype=torch.float32) for _ in range(2))
    grads = ROUTES[name](q, k, v, dout)
    backward_passes = BACKWARD_PASSES.get(name, 1)
    assert first.count("backward") == backward_passes
    assert "forward" in first
    assert [call.tier for call in trace.gradients.elements()] == ["simdgroup"] * backward_passes
    assert {call.tier for call in trace.calls} == {"simdgroup"}
    assert not [refusal for refusal in trace.refusals if refusal.direction == "backward"]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(oracle.dense(*exact).out, exact, dout.double())
    tolerance = 3e-2 if name == "autocast" else 1e-5
    for mine, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)
