"""However a program comes to gradients, the kernels compute them: forward, and all of the backward pass."""

import pytest
import torch

from flash_attn_mps import sdpa, tiers, trace
from metal_host import observe
from tests.attention import oracle
from tests.attention.gradient_routes import BACKWARD_PASSES, ROUTES, instead_of_torchs
from tests.attention.layouts import randn

BACKWARD = ["attention_backward_keys", "attention_backward_queries", "attention_backward_rows"]


@pytest.fixture
def traced(monkeypatch):
    for counts in ("calls", "gradients", "refusals"):
        monkeypatch.setattr(trace, counts, trace.Counter())
    monkeypatch.setattr(trace, "enabled", True)
    instead_of_torchs(monkeypatch)
    yield
    monkeypatch.undo()
    sdpa.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ROUTES)
def test_the_kernels_compute_gradients(name):
    q, dout = randn(2, 12, 4, 16, dtype=torch.float32), randn(2, 12, 4, 16, dtype=torch.float32)
    k, v = (randn(2, 12, 2, 16, dtype=torch.float32) for _ in range(2))
    with observe(instrumented=False) as launches:
        grads = ROUTES[name](q, k, v, dout)
    kernels = [launch.kernel for launch in launches]
    forward = [kernel for kernel in kernels if kernel not in BACKWARD]
    assert set(forward) <= {"attention_forward", "attention_decode"}
    assert len(forward) == trace.calls.total() > 0
    assert {*kernels} >= {*BACKWARD}
    assert {call.tier for call in trace.calls} <= tiers.METAL
    assert [call.tier for call in trace.gradients.elements()] == ["simdgroup"] * BACKWARD_PASSES.get(name, 1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(oracle.dense(*exact).out, exact, dout.double())
    tolerance = 3e-2 if name == "autocast" else 1e-5
    for mine, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)
