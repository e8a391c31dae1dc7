"""`install()` after libraries have asked: what they concluded is mended, and what cannot be is said once."""

import pytest

LATE = {"MTLFLASHATTN_SHIM": "off", "PYTHONWARNINGS": "default"}

INSTALL = """
def install():
    import os, warnings, flash_attn_shim
    os.environ["MTLFLASHATTN_SHIM"] = "on"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        flash_attn_shim.install()
    return [str(warning.message) for warning in said]
"""

# diffusers, in the shape that counts: answers kept at import, functions taken at import.
DIFFUSERS = {
    "diffusers/__init__.py": "",
    "diffusers/utils/__init__.py": "",
    "diffusers/utils/import_utils.py": """
        import functools, importlib.util
        _flash_attn_available = importlib.util.find_spec("flash_attn") is not None
        _flash_attn_version = "N/A"
        def is_flash_attn_available():
            return _flash_attn_available
        @functools.cache
        def is_flash_attn_version(operation, version):
            return _flash_attn_version
        """,
    "diffusers/models/__init__.py": "",
    "diffusers/models/attention_dispatch.py": """
        from diffusers.utils.import_utils import is_flash_attn_available
        _CAN_USE_FLASH_ATTN = is_flash_attn_available()
        flash_attn_func = flash_attn_varlen_func = _wrapped_flash_attn_forward = _wrapped_flash_attn_backward = None
        """,
}

ASK = """
import diffusers.models.attention_dispatch as dispatch, diffusers.utils.import_utils as utils
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward")
def ask():
    version = utils.is_flash_attn_version(">=", "2")
    taken = sum(callable(getattr(dispatch, name)) for name in FUNCTIONS)
    return dispatch._CAN_USE_FLASH_ATTN, utils.is_flash_attn_available(), version, taken
"""

GAVE_UP = """
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        flash_attn_func = None
    """


def test_diffusers_is_mended_and_undone(hooked, files):
    program = f"""
{INSTALL}{ASK}
before = ask()
said = install()
print(said, ask())
import flash_attn_shim
flash_attn_shim.uninstall()
utils.is_flash_attn_version.cache_clear()
assert ask() == before == (False, False, "N/A", 0)
"""
    printed = hooked.run(program, PYTHONPATH=files(DIFFUSERS), **LATE)
    assert printed == "[] (True, True, '2.8.3', 4)"


def test_a_diffusers_of_another_shape_is_left_alone_and_said(hooked, files):
    tree = {**DIFFUSERS, "diffusers/models/attention_dispatch.py": "_CAN_USE_FLASH_ATTN = False\n"}
    program = f"""
{INSTALL}
import diffusers.models.attention_dispatch, diffusers.utils.import_utils as utils
said = install()
assert not utils.is_flash_attn_available()
print(*said)
"""
    printed = hooked.run(program, PYTHONPATH=files(tree), **LATE)
    assert printed.startswith(
        "diffusers was imported before flash_attn_shim.install() and will not use flash_attn: call"
    )


def test_who_gave_up_is_named_once(hooked, files):
    later = "def attend(q):\n    from flash_attn import flash_attn_func\n    return flash_attn_func(q, q, q)\n"
    tree = {"gave_up.py": GAVE_UP, "asks_later.py": later}
    program = f"""
{INSTALL}
import gave_up, asks_later
said = [*install(), *install()]
assert len(said) == 1, said
print(said[0].partition(":")[0])
"""
    printed = hooked.run(program, PYTHONPATH=files(tree), **LATE)
    assert printed == "gave_up was imported before flash_attn_shim.install() and will not use flash_attn"


def test_in_time_nothing_is_said(hooked, files):
    tree = {**DIFFUSERS, "other.py": GAVE_UP}
    program = f"{INSTALL}\nsaid = install()\nimport other\nprint(said + install(), other.flash_attn_func.__name__)"
    assert hooked.run(program, PYTHONPATH=files(tree), **LATE) == "[] flash_attn_func"


def test_libraries_that_asked_while_it_was_switched_off(hooked, files):
    """Without `install()`, the next look-up says what to do, once, and that helps."""
    program = """
import os, sys, warnings, importlib.util
import diffusers.utils.import_utils as utils
from transformers.utils import import_utils
assert not import_utils.is_flash_attn_2_available()
os.environ["MTLFLASHATTN_SHIM"] = "on"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        importlib.util.find_spec("flash_attn")
    import flash_attn
assert len(said) == 1, said
print(said[0].message)
exec(str(said[0].message).partition("call ")[2].partition(",")[0], {"flash_attn_shim": __import__("flash_attn_shim")})
assert utils.is_flash_attn_available() and import_utils.is_flash_attn_2_available()
"""
    printed = hooked.run(program, PYTHONPATH=files(DIFFUSERS), **LATE)
    assert printed.startswith(
        "transformers and diffusers checked for flash_attn before it was available, and will not use it: "
    )


@pytest.mark.parametrize("variables", [{"MTLFLASHATTN_TRANSFORMERS": "off"}, {}])
def test_libraries_that_asked_in_time_hear_nothing(hooked, files, variables):
    program = """
import warnings
warnings.simplefilter("error")
import transformers.utils.import_utils, diffusers.utils.import_utils, importlib.util
import flash_attn, flash_attn_interface
assert importlib.util.find_spec("flash_attn") is not None
"""
    assert hooked.run(program, PYTHONPATH=files(DIFFUSERS), MTLFLASHATTN_SHIM="on", **variables) == ""


def test_models_that_import_behind_the_probe(hooked):
    """transformers has models whose flash_attention_2 is imported at their top, behind the probe."""
    program = f"""
{INSTALL}
import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.bark import modeling_bark as bark
assert install() == []
sizes = dict(block_size=16, input_vocab_size=16, output_vocab_size=16, num_layers=1, num_heads=2, hidden_size=16)
falcon = FalconConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
for make, config in (FalconForCausalLM, falcon), (bark.BarkSemanticModel, bark.BarkSemanticConfig(**sizes)):
    outs = []
    for attention in ("eager", "flash_attention_2"):
        torch.manual_seed(0)
        model = make._from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            outs.append(model(torch.arange(8).reshape(1, 8)).logits)
    assert torch.allclose(*outs, atol=1e-5), (outs[0] - outs[1]).abs().max()
"""
    assert hooked.run(program, MTLFLASHATTN_SHIM="off") == ""
