"""A short run of the fuzz; `python -m tests.numerics.fuzz` makes a long one."""

import pytest

from . import fuzz


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.metal_full)])
def test_random_calls_are_right(seed):
    found = fuzz.fuzz(calls=120, kinds=12, seed=seed)
    assert not found.wrong, "\n".join(found.wrong)


def test_a_wrong_tier_is_noticed(monkeypatch):
    """One number of one call, off by a little more than rounding."""
    from flash_attn_mps import tiers
    from tests.replaced_tiers import replace_tier

    def off(p):
        result = tiers_run(p)
        result.out.view(-1)[0] += 0.05
        return result

    tiers_run = tiers.BY_NAME["torch"].run
    replace_tier(monkeypatch, "torch", run=off)
    monkeypatch.setattr(fuzz, "SIZES", (1.0,))
    monkeypatch.setattr(fuzz, "TIERS", ("torch",) * 100)
    assert fuzz.fuzz(calls=30, kinds=3, seed=1).wrong
