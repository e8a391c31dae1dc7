"""What a caller may pass: hostile arguments give a right result or an error by name, and harmless ones are taken."""

import os
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from flash_attn_mps import checks
from flash_attn_mps.frontends import fa2, fa2_private, fa3
from tests.compiled import compiled

from . import fuzz_arguments
from .malformed import private_backward

Q = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(0, 600, 100))
def test_some_hundred_hostile_calls(seed):
    """`python -m tests.attention.fuzz_arguments` makes 60,000."""
    problems = {n: fuzz_arguments.problem_of(n) for n in range(seed, seed + 100)}
    assert not {n: problem for n, problem in problems.items() if problem is not None}


def refuses_by_another_name(q, scale=1.0):
    if not isinstance(scale, float):
        raise ValueError(f"q: got {scale!r:.20}; accepted: a tensor")
    return q


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (refuses_by_another_name, "ValueError names another argument"),
        (lambda q: q + None, "TypeError"),
        (lambda q: torch.zeros(2).view(3), "RuntimeError"),
        (lambda q: torch.full((2,), torch.nan), "returns NaN or inf"),
        (lambda q: torch.full((2,), float(os.environ.get("MTLFLASHATTN_KERNEL") == "torch")), "another result"),
    ],
)
def test_the_fuzz_notices_what_it_is_for(monkeypatch, function, problem):
    monkeypatch.setattr(fuzz_arguments, "CALLS", [(function, lambda: {"q": torch.ones(2)})])
    problems = [str(fuzz_arguments.problem_of(n)) for n in range(60)]
    assert any(found.startswith(problem) for found in problems)


FLAGS = [
    1,
    0,
    None,
    2.0,
    np.bool_(True),
    np.bool_(False),
    np.array(1),
    np.array([0]),
    torch.tensor(True),
    torch.zeros(1, 1),
]


@pytest.mark.parametrize("value", FLAGS, ids=repr)
def test_flags(value):
    """What says true or false is taken for it, by every function that has flags."""
    plain = bool(value)
    out = fa2.flash_attn_func(Q, Q, Q, causal=value, deterministic=value, return_attn_probs=value)
    assert isinstance(out, tuple) == plain
    expected = fa2.flash_attn_func(Q, Q, Q, causal=plain, return_attn_probs=True)[0]
    assert torch.equal(out[0] if plain else out, expected)
    cached = fa3.flash_attn_with_kvcache(Q, Q.clone(), Q.clone(), causal=value, return_softmax_lse=value)
    assert isinstance(cached, tuple) == plain
    torch.testing.assert_close(cached[0] if plain else cached, expected)
    probs = fa2_private._flash_attn_forward(Q, Q, Q, 0.5, None, value, -1, -1, 0.0, None, value)[2]
    assert (probs.numel() > 0) == plain


@pytest.mark.parametrize(
    "value",
    [Fraction(1, 2), Decimal("0.5"), np.float16(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).half()],
)
def test_numbers(value):
    expected = fa2.flash_attn_func(Q, Q, Q, 0.0, 0.5, softcap=0.5)
    assert torch.equal(fa2.flash_attn_func(Q, Q, Q, 0.0, value, softcap=value), expected)


def test_the_ends_of_the_ranges():
    """The last number that is taken, of float32 and of 64 bits."""
    largest, smallest = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
    assert checks.softmax_scale(-largest, 8, Q) == -largest
    assert checks.softcap(smallest) == smallest
    plain = fa2.flash_attn_func(Q, Q, Q)
    for side in (2**63 - 1, -(2**63)):
        assert torch.equal(fa2.flash_attn_func(Q, Q, Q, window_size=(side, side)), plain)
    torch.testing.assert_close(fa3.flash_attn_func(Q, Q, Q, attention_chunk=2**63 - 1), plain)
    for softcap in (smallest, largest):
        assert fa2.flash_attn_func(Q, Q, Q, softcap=softcap).isfinite().all()


@pytest.mark.parametrize("name", ["dout", "out", "softmax_lse"])
def test_gradients_from_tensors_of_any_strides(name):
    """PyTorch's backward for CPU tensors reads some of these as if their last dimension were contiguous."""
    call = private_backward() | {"causal": False}
    expected = {n: call[n] for n in ("dq", "dk", "dv")}
    fa2_private._flash_attn_backward(**call)
    spread = torch.stack((call[name], torch.full_like(call[name], 7.0)), -1)[..., 0]
    grads = {n: torch.empty_like(x) for n, x in expected.items()}
    fa2_private._flash_attn_backward(**(call | grads | {name: spread}))
    for n, right in expected.items():
        torch.testing.assert_close(grads[n], right)


def test_flags_that_vary_with_a_length_stay_in_one_graph():
    """Dynamo has such a flag as a symbol."""

    def call(q):
        return fa2.flash_attn_func(q, q, q, causal=q.shape[1] > 4, return_attn_probs=q.shape[1] > 2)[0]

    fast, _ = compiled(call, "eager")
    for n in (6, 5, 3):
        torch.testing.assert_close(fast(Q[:, :n]), call(Q[:, :n]))


def test_a_value_without_a_repr_has_a_message():
    """Nor does Python print an integer of 4,301 digits."""
    for value in ((10**5000, 0), type("Odd", (), {"__repr__": lambda _: 1 / 0})()):
        with pytest.raises(ValueError, match="window_size: got "):
            fa2.flash_attn_func(Q, Q, Q, window_size=value)
