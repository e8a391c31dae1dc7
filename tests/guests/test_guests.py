"""What programs get for what their code shows: results in an older shape, names, a flash_attn that is not there."""

import json
import sys

import pytest

from tests.shim.environments import MAC, write

from . import early_results, insisting, unpadding

# Imports each program and prints what became of it. `check(module)` raises where a result is wrong.
DRIVER = """
import importlib, json, sys
import torch
torch.manual_seed(0)
torch.set_num_threads(1)

def truth(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())

def attends(module, batches=(2, 3)):
    for batch in batches:
        q, k, v = torch.randn(3, batch, 5, 2, 8).unbind()
        got, right = module.attend(q, k, v), truth(q, k, v)
        assert got.shape == right.shape, got.shape
        assert torch.allclose(got.double(), right, atol=1e-5), (got - right).abs().max()

def unpads(module):
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    tokens, indices, cu_seqlens, max_seqlen = module.run(x, mask)
    assert torch.equal(tokens, x.flatten(0, 1)[indices]) and indices.tolist() == [0, 1, 2, 4, 5]
    assert cu_seqlens.tolist() == [0, 3, 5] and max_seqlen == 3

def report(names, check):
    outcomes = []
    for name in names:
        try:
            check(importlib.import_module(name))
            outcomes.append("right")
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    print(json.dumps(outcomes))
"""


@pytest.fixture
def outcomes(with_torch, tmp_path):
    """Run programs, name -> source, in one interpreter; return name -> "right" or what went wrong."""

    def run(programs, check, before="", mac=False, **variables):
        modules = {f"program_{number}": source for number, source in enumerate(programs.values())}
        write(tmp_path, {f"{name}.py": source for name, source in modules.items()})
        text = f"{MAC if mac else ''}{DRIVER}{before}\nreport({[*modules]}, {check})"
        switch = {} if mac else {"MTLFLASHATTN_SHIM": "on"}
        done = with_torch.start("-c", text, PYTHONPATH=tmp_path, OMP_NUM_THREADS=1, **{**switch, **variables})
        assert done.returncode == 0, done.stderr
        return dict(zip(programs, json.loads(done.stdout.splitlines()[-1]), strict=True))

    return run


def right(programs):
    return dict.fromkeys(programs, "right")


@pytest.mark.parametrize("mac", [False, True])
def test_results_of_flash_attention_3(outcomes, mac):
    programs = early_results.EARLY | {f"today: {name}": text for name, text in early_results.TODAY.items()}
    assert outcomes(programs, "attends", mac=mac) == right(programs)


def test_early_results_that_nothing_shows(outcomes):
    found = outcomes(early_results.UNDECIDABLE, "attends")
    assert all(outcome.startswith("AssertionError: torch.Size([5, 2, 8])") for outcome in found.values()), found


def test_unpad_input(outcomes):
    programs = unpadding.FOUR | {f"five: {name}": text for name, text in unpadding.FIVE.items()}
    assert outcomes(programs, "unpads") == right(programs)


def test_unpadding_that_nothing_shows(outcomes):
    found = outcomes(unpadding.UNDECIDABLE, "unpads")
    assert all("too many values to unpack" in outcome for outcome in found.values()), found


@pytest.mark.parametrize(
    "before", ["", "import flash_attn.bert_padding, flash_attn_interface; from flash_attn import flash_attn_func"]
)
def test_programs_that_insist_on_cuda(outcomes, before):
    """Also where another module has imported flash_attn before them, which Python then asks nobody for."""
    programs = insisting.INSISTING | {f"open: {name}": text for name, text in insisting.OPEN.items()}
    if before and sys.version_info < (3, 13):  # classes are not made anew
        del programs["wrapped in a class"]
    assert outcomes(programs, "attends", before) == right(programs)


def test_insisting_that_nothing_shows(outcomes):
    found = outcomes(insisting.UNDECIDABLE, "attends")
    assert all(outcome.startswith("AssertionError") for outcome in found.values()), found
    names = ",".join(f"program_{number}" for number in range(len(insisting.UNDECIDABLE)))
    assert outcomes(insisting.UNDECIDABLE, "attends", MTLFLASHATTN_HIDE=names) == right(insisting.UNDECIDABLE)


def test_nothing_is_decided_on_demand(outcomes):
    """MTLFLASHATTN_FLAGS=off: flash-attn 2.8 and today's FlashAttention 3, for everybody."""
    name, program = "unpacked", unpadding.FOUR["unpacked"]
    assert "too many values" in outcomes({name: program}, "unpads", MTLFLASHATTN_FLAGS="off")[name]
    assert "AssertionError" in outcomes({"Wan": insisting.INSISTING["Wan"]}, "attends", MTLFLASHATTN_FLAGS="off")["Wan"]
