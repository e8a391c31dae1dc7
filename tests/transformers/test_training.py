"""transformers' Trainer: flash_attention_2 learns what eager learns, step by step, in plain PyTorch and in kernels."""

import functools
import json

import pytest
import transformers
from conftest import start

MAJOR = int(transformers.__version__.partition(".")[0])
TIERS = ("torch", "simdgroup")
#: Since which major version of transformers they have flash_attention_2; a version of peft goes with the newest alone.
MODELS = {"llama": 4, "gemma2": 4, "llama, LoRA": 5, "bert": 5, "bert, dropout": 5}
NAMES = [name for name, since in MODELS.items() if since <= MAJOR]
FULL = ("gemma2", "llama, LoRA")  # with -m metal_full
STEPS, LAYERS = 20, 2


@functools.cache
def trained(full):
    names = [name for name in NAMES if (name in FULL) == full]
    printed = start("training.py", ";".join(names), "eager", *TIERS, MTLFLASHATTN_SHIM="on")
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.metal_full] * (n in FULL)) for n in NAMES])
def test_losses_of_twenty_steps(name):
    eager, *flash = (trained(name in FULL)[name][attention] for attention in ("eager", *TIERS))
    assert eager["gradients"] == {}
    for tier, found in zip(TIERS, flash, strict=True):
        assert found["gradients"] == {tier: LAYERS * STEPS}
        # With dropout eager has masks of its own; those of the tiers are the same.
        expected = flash[0] if name == "bert, dropout" else eager
        assert found["losses"] == pytest.approx(expected["losses"], rel=0, abs=1e-3)
        assert len(found["losses"]) == STEPS


@pytest.mark.skipif(MAJOR < 5, reason="BERT has flash_attention_2 since transformers 5")
def test_dropout_is_on_and_attention_matters():
    """Else the losses above would say nothing."""
    plain, dropped = (trained(False)[name]["simdgroup"]["losses"] for name in ("bert", "bert, dropout"))
    assert max(abs(one - other) for one, other in zip(plain, dropped, strict=True)) > 0.05
    assert sum(dropped[-5:]) < sum(dropped[:5]) - 1.0
