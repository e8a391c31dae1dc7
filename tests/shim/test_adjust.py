"""The hook behind a module's execution, on a library made for it: what it changes, and that it leaves no trace."""

import pytest

from .environments import write

ON = {"MTLFLASHATTN_SHIM": "on"}

# A stand-in with the two shapes that matter: 5.x's table and 4.x's check, and a from-import of the probe.
LIBRARY = {
    "transformers/__init__.py": "",
    "transformers/utils/__init__.py": "from .import_utils import is_flash_attn_2_available\n",
    "transformers/utils/import_utils.py": """
        import functools
        calls = []
        @functools.lru_cache
        def is_flash_attn_2_available(kernels_fallback_ok=False):
            calls.append(kernels_fallback_ok)
            return False
        """,
    "transformers/modeling_flash_attention_utils.py": """
        from .utils import is_flash_attn_2_available
        FLASH_ATTENTION_COMPATIBILITY_MATRIX = {2: {
            "general_availability_check": is_flash_attn_2_available,
            "supported_devices": ((lambda: False, "cuda"),),
        }}
        """,
    "transformers/modeling_utils.py": "class PreTrainedModel: pass\n",
}

ASK = """
import transformers.utils.import_utils as u, transformers.utils, transformers.modeling_flash_attention_utils as f
def ask():
    entry = f.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    probes = {u.is_flash_attn_2_available, transformers.utils.is_flash_attn_2_available, f.is_flash_attn_2_available,
              entry["general_availability_check"]}
    assert len(probes) == 1
    return probes.pop()(), [name for check, name in entry["supported_devices"] if check()]
"""


@pytest.fixture
def library(tmp_path):
    return write(tmp_path / "library", LIBRARY)


def test_adjusted_when_it_is_imported(installed, library):
    program = ASK + "print(*ask(), u.is_flash_attn_2_available(kernels_fallback_ok=True), u.calls)"
    assert installed.run(program, PYTHONPATH=library, **ON) == "True ['cpu'] True []"


@pytest.mark.parametrize("variables", [{"MTLFLASHATTN_SHIM": "off"}, {**ON, "MTLFLASHATTN_TRANSFORMERS": "off"}])
def test_left_alone_when_switched_off(installed, library, variables):
    program = ASK + "print(*ask(), hasattr(u.is_flash_attn_2_available, 'cache_info'))"
    assert installed.run(program, PYTHONPATH=library, **variables) == "False [] True"


def test_left_alone_when_flash_attn_is_real(installed, library):
    write(library, {"flash_attn/__init__.py": ""})
    program = ASK + "print(*ask(), hasattr(u.is_flash_attn_2_available, 'cache_info'))"
    assert installed.run(program, PYTHONPATH=library, **ON) == "False [] True"


def test_the_answer_follows_the_switch(installed, library):
    program = (
        ASK
        + """
import os
answers = []
for name, value in (("SHIM", "off"), ("SHIM", "on"), ("TRANSFORMERS", "off"), ("TRANSFORMERS", "")):
    os.environ["MTLFLASHATTN_" + name] = value
    answers.append(ask())
print(answers)
"""
    )
    off, on = (False, []), (True, ["cpu"])
    assert installed.run(program, PYTHONPATH=library, **ON) == str([off, on, off, on])


def test_caught_up_with_and_undone(installed, library):
    """Imported while the hook was off, and asked already: install() adjusts it, uninstall() takes everything back."""
    program = (
        ASK
        + """
import os, sys, flash_attn_shim
assert ask() == (False, [])
before = u.is_flash_attn_2_available
os.environ["MTLFLASHATTN_SHIM"] = "on"
assert ask() == (False, [])
import importlib.metadata as m
assert not list(m.distributions(name="flash_attn"))  # together with the adjustment or not at all
assert "flash_attn_shim.install()" in flash_attn_shim.status().metadata
flash_attn_shim.install()
flash_attn_shim.install()
assert ask() == (True, ["cpu"])
assert list(m.distributions(name="flash_attn")) and flash_attn_shim.status().metadata is None
assert u.is_flash_attn_2_available.__wrapped__ is before
flash_attn_shim.uninstall()
assert ask() == (False, []) and u.is_flash_attn_2_available is before
flash_attn_shim.install()
assert ask() == (True, ["cpu"])
"""
    )
    assert installed.run(program, PYTHONPATH=library, MTLFLASHATTN_SHIM="off") == ""


def test_undo_respects_who_came_later(installed, library):
    program = (
        ASK
        + """
import flash_attn_shim
mine = u.is_flash_attn_2_available = lambda: "mine"
flash_attn_shim.uninstall()
assert u.is_flash_attn_2_available is mine
assert transformers.utils.is_flash_attn_2_available() is False
"""
    )
    assert installed.run(program, PYTHONPATH=library, **ON) == ""


def test_the_loader_is_the_real_one_and_keeps_no_trace(installed, library):
    program = """
    import importlib, importlib.machinery as machinery, importlib.util as util, inspect
    import transformers.utils.import_utils as u
    assert type(u.__spec__.loader) is type(u.__loader__) is machinery.SourceFileLoader
    assert "exec_module" not in vars(u.__loader__)
    assert u.__file__.endswith("import_utils.py") and "lru_cache" in inspect.getsource(u)
    assert importlib.reload(u).is_flash_attn_2_available()
    assert type(util.find_spec("transformers.modeling_utils").loader) is machinery.SourceFileLoader
    """
    assert installed.run(program, PYTHONPATH=library, **ON) == ""


@pytest.mark.parametrize(
    ("files", "module", "reason"),
    [
        (
            {"transformers/utils/import_utils.py": "is_flash_attn_2 = None\n"},
            "utils.import_utils",
            "has no is_flash_attn_2_available",
        ),
        ({"transformers/modeling_flash_attention_utils.py": ""}, "modeling_flash_attention_utils", "before 5.x"),
        (
            {"transformers/modeling_flash_attention_utils.py": "FLASH_ATTENTION_COMPATIBILITY_MATRIX = {2: {}}\n"},
            "modeling_flash_attention_utils",
            "no tuple of supported_devices",
        ),
        ({"transformers/modeling_utils.py": ""}, "modeling_utils", "no PreTrainedModel"),
    ],
)
def test_what_does_not_fit_is_left_untouched_and_says_why(installed, library, files, module, reason):
    write(library, {"transformers/utils/__init__.py": "", **files})
    program = f"""
    import importlib, flash_attn_shim
    module = importlib.import_module("transformers.{module}")
    print(dict(flash_attn_shim.status().adjustments)[module.__name__])
    """
    state = installed.run(program, PYTHONPATH=library, **ON)
    assert state.startswith("left alone: ")
    assert reason in state


def test_a_misfit_takes_the_metadata_with_it(installed, library):
    write(library, {"transformers/utils/__init__.py": "", "transformers/utils/import_utils.py": ""})
    program = """
    import importlib.metadata as m
    print(len(list(m.distributions(name="flash_attn"))))
    import transformers.utils.import_utils
    print(len(list(m.distributions(name="flash_attn"))))
    """
    assert installed.run(program, PYTHONPATH=library, **ON).split() == ["1", "0"]


def test_a_module_that_fails_fails_as_it_does(installed, library):
    write(library, {"transformers/utils/__init__.py": "", "transformers/utils/import_utils.py": "1 / 0\n"})
    program = """
    for _ in range(2):
        try:
            import transformers.utils.import_utils
        except ZeroDivisionError as error:
            print(error.__traceback__.tb_next is not None)
    """
    assert installed.run(program, PYTHONPATH=library, **ON).split() == ["True", "True"]


def test_each_adjusted_module_has_its_function():
    from importlib import import_module

    from flash_attn_shim.autoload import ADJUSTED

    for name, file in ADJUSTED.items():
        assert callable(import_module(f"flash_attn_shim.adjust.{file}").MODULES[name])
