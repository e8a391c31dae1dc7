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


VERSION_1 = "from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func\n"


def test_names_of_flash_attention_1(outcomes):
    """There for who imports them without another way, with version 1's signature; nobody else sees them."""
    programs = {
        "behind find_spec": f"""
            import importlib.util
            if importlib.util.find_spec("flash_attn"):
                {VERSION_1.strip()}
            """,
        "handlers that leave": f"""
            import sys
            try:
                {VERSION_1.strip()}
            except ImportError as error:
                print(error)
                sys.exit(1)
            """,
        "by another name, in a function": """
            def take():
                from flash_attn.flash_attn_interface import (
                    flash_attn_unpadded_kvpacked_func as attend,
                )
                return attend
            flash_attn_unpadded_kvpacked_func = take()
            """,
        "in try": """
            try:
                from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func
                HAS_FLASH = True
            except ImportError:
                HAS_FLASH = False
            assert not HAS_FLASH
            """,
        "suppressed": f"""
            import contextlib
            with contextlib.suppress(ImportError):
                {VERSION_1.strip()}
            assert "flash_attn_unpadded_kvpacked_func" not in globals()
            """,
        "asked for": """
            import flash_attn.flash_attn_interface as interface
            assert not hasattr(interface, "flash_attn_unpadded_func")
            assert "flash_attn_unpadded_func" not in dir(interface)
            """,
    }
    check = """
def calls(module):
    function = vars(module).get("flash_attn_unpadded_kvpacked_func")
    if function is None:
        return
    q, kv, bounds = torch.randn(5, 2, 8), torch.randn(5, 2, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    out = function(q, kv, bounds, bounds, 3, 3, 0.0, 1.0, True)
    first = truth(q[None, :1] * 8**0.5, kv[None, :1, 0], kv[None, :1, 1])
    assert torch.allclose(out[:1].double(), first[0], atol=1e-5)
    try:
        function(q, kv, bounds, torch.tensor([0, 3, 5], dtype=torch.int32), 3, 3, dropout_p=0.0, causal=True)
    except NotImplementedError as error:
        assert "top left" in str(error)
    else:
        raise AssertionError
"""
    assert outcomes(programs, "calls", check) == right(programs)


KERNELS = """
    from flash_attn import flash_attn_func
    import torch
    IS_AMPERE = torch.cuda.get_device_capability("cuda") == (8, 0)
    """


@pytest.mark.parametrize("before", ["", "import flash_attn\n"])
@pytest.mark.parametrize(
    "kernels",
    [
        KERNELS,
        KERNELS.replace("    from flash_attn import flash_attn_func\n", ""),  # and only its importer has asked
        "from flash_attn.bert_padding import unpad_input\nimport torch\nEMPTY = torch.empty(1, device='cuda')\n",
    ],
)
def test_cuda_at_import(with_torch, tmp_path, kernels, before):
    """A module that asks for CUDA at its top, imported in `try` where flash_attn was found: as if it were not."""
    importer = """
        try:
            from flash_attn import flash_attn_varlen_func
            from program.kernels import anything
            FLASH = True
        except ImportError:
            FLASH = False
        """
    write(tmp_path, {"program/__init__.py": "", "program/kernels.py": kernels, "program/model.py": importer})
    if before and "flash_attn" not in kernels and sys.version_info < (3, 13):
        pytest.skip("the importer has been told yes, and the module that fails has asked nobody")
    program = f"""{before}
from program import model
import flash_attn_shim
print(model.FLASH, flash_attn_shim.status().decisions[0].what)
"""
    printed = with_torch.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_SHIM="on")
    assert printed.startswith("False does not see flash_attn: ")
    assert "asks for CUDA" in printed


@pytest.mark.parametrize(
    "line",
    [
        "HAS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)",
        "CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None",
        "def later():\n    return torch.cuda.current_device()",
        "try:\n    NAME = torch.cuda.get_device_name(0)\nexcept Exception:\n    NAME = None",
    ],
)
def test_cuda_that_is_asked_for_with_care(with_torch, tmp_path, line):
    write(tmp_path, {"program.py": f"import torch\nfrom flash_attn import flash_attn_func\n{line}\n"})
    program = "import program, flash_attn_shim; print(flash_attn_shim.status().decisions)"
    assert with_torch.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_SHIM="on") == "()"


def test_private_functions_by_position(outcomes):
    """They differ from build to build: where there is another way, FlashAttention 3 is not seen."""
    text = """
        try:
            from flash_attn_interface import _flash_attn_forward
            THREE = True
        except ImportError:
            THREE = False

        def attend(q, k, v):
            return _flash_attn_forward({arguments})[0]
        """
    programs = {
        "by position": text.format(arguments="q, k, v, None, None, None") + "\n        assert not THREE",
        "by name": text.format(arguments="q=q, k=k, v=v, softmax_scale=1.0") + "\n        assert THREE",
    }
    assert outcomes(programs, "(lambda module: None)") == right(programs)


def test_a_mistake_in_reading_breaks_nobody(with_torch, tmp_path):
    write(tmp_path, {"program.py": insisting.INSISTING["Wan"]})
    program = """
    import flash_attn_shim.guests.presence as presence, flash_attn_shim
    presence.Module.reasons = lambda *_: 1 / 0
    import program
    print(program.FLASH_ATTN_2_AVAILABLE, flash_attn_shim.status().decisions[0].what)
    """
    printed = with_torch.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_SHIM="on")
    assert printed == "True its source could not be read: ZeroDivisionError('division by zero')"


def test_modules_stay_ordinary_ones(with_torch):
    program = """
    import importlib, pickle, sys, types, flash_attn, flash_attn_interface
    assert all(isinstance(m, types.ModuleType) for m in (flash_attn, flash_attn_interface))
    assert flash_attn.__spec__.name == "flash_attn" and importlib.reload(flash_attn) is flash_attn
    assert pickle.loads(pickle.dumps(flash_attn)) is flash_attn
    """
    assert with_torch.run(program, MTLFLASHATTN_SHIM="on") == ""
