"""Tiny models give with FlashAttention what they give with "eager": whole, padded on either side, and generating."""

import pytest
import tiny

RUNS = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name, (_, _, runs) in tiny.MODELS.items()
    for major, implementation in sorted(runs)
    if major == tiny.MAJOR
]

# ModernBERT of 4.57 converts to bfloat16 for FlashAttention.
TOLERANCE = {"modernbert": 1e-2 if tiny.MAJOR < 5 else 1e-5}


@pytest.mark.parametrize(("name", "implementation"), RUNS)
def test_equals_eager(tiny_models, name, implementation):
    result = tiny_models(implementation)[name]
    assert "error" not in result, result["error"]
    assert result["calls"] > 0
    assert {"prefill", "padded left"} <= set(result["differences"])
    for case, difference in result["differences"].items():
        assert difference <= (0 if case.startswith("generate") else TOLERANCE.get(name, 1e-5)), case
