"""`trust_remote_code=True`: models whose files import flash_attn load, and use it, in each manner found on the Hub."""

import json

import pytest

from . import remote_code

LOAD = """
import json, sys, torch
from transformers import AutoModel, dynamic_module_utils

def load(name, **kwargs):
    return AutoModel.from_pretrained(f"{models}/{name.replace(' ', '-')}", trust_remote_code=True, **kwargs).eval()

def route(model):
    with torch.no_grad():
        out, expected = model(torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(out, expected, atol=1e-5)
    return sys.modules[type(model).__module__].ROUTE

def outcome(function, *arguments, **kwargs):
    try:
        return function(*arguments, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""

EACH = f"""
answers = {{name: outcome(lambda: route(load(name))) for name in {[*remote_code.PATTERNS, "unsupported"]}}}
refused = outcome(load, "unsupported", attn_implementation="flash_attention_2")
print(json.dumps([answers, refused]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with one model for each pattern, one that does not support flash attention, and a cache."""
    directory = tmp_path_factory.mktemp("remote")
    for pattern in remote_code.PATTERNS:
        remote_code.write(directory / pattern.replace(" ", "-"), pattern)
    remote_code.write(directory / "unsupported", "florence-2", supports=False)
    return directory


@pytest.fixture(scope="module")
def run(models):
    """Run a program with `load` and the like in an interpreter."""

    def run(interpreter, program, **variables):
        return interpreter.run(
            f"models = {str(models)!r}\n{LOAD}{program}", HF_MODULES_CACHE=models / "cache", **variables
        )

    return run


def test_each_pattern_uses_flash_attn(hooked, run):
    routes, refused = json.loads(run(hooked, EACH, MTLFLASHATTN_SHIM="on"))
    assert routes == dict.fromkeys([*remote_code.PATTERNS, "unsupported"], "flash")
    # The file itself may call flash_attn; asked for by name, transformers refuses in its own words.
    assert "does not support Flash Attention 2" in refused


def test_switched_off_they_are_as_without(hooked, without, run):
    """Guarded files take their other way; a bare import is refused, in transformers' words."""
    answers = run(hooked, EACH, MTLFLASHATTN_SHIM="off")
    assert answers == run(without, EACH)
    routes, refused = json.loads(answers)
    for name, route in routes.items():
        if name in remote_code.REFUSED_WITHOUT_FLASH_ATTN:
            assert "requires the following packages that were not found in your environment: flash_attn" in route
        else:
            assert route == "softmax"
    assert "does not support Flash Attention 2" in refused


def test_workarounds_that_users_have_in_place(hooked, run):
    """A patched get_imports that drops flash_attn; sys.modules["flash_attn"] = None; check_imports by itself."""
    program = """
from unittest.mock import patch
bare = f"{models}/stripedhyena/modeling_tiny.py"
assert dynamic_module_utils.check_imports(bare) == []
original = dynamic_module_utils.get_imports

def fixed_get_imports(filename):
    return [name for name in original(filename) if name != "flash_attn"]

with patch("transformers.dynamic_module_utils.get_imports", fixed_get_imports):
    print(route(load("stripedhyena")), route(load("phi-3-vision")))
for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
    del sys.modules[name]
sys.modules["flash_attn"] = None
print(outcome(dynamic_module_utils.check_imports, bare))
print(outcome(__import__, "flash_attn.bert_padding"))
"""
    patched, checked, imported = run(hooked, program, MTLFLASHATTN_SHIM="on").splitlines()
    assert patched == "flash flash"
    assert checked.startswith("ModuleNotFoundError: import of flash_attn halted; None in sys.modules")
    assert imported.startswith("ModuleNotFoundError: No module named 'flash_attn.bert_padding'")
