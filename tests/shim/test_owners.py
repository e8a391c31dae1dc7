"""Other projects under our names: PyPI's `mtlflashattn`, and the package `flash_attn_mps` of flash-attn-mps."""

import json

import pytest

from flash_attn_shim import owners

from .environments import ROOT, make_venv, write

ON = {"MTLFLASHATTN_SHIM": "on"}

#: What PyPI's mtlflashattn 0.2.0 installs, as far as it matters here.
NAMESAKE = {
    "metal_flash_attn/__init__.py": "",
    "_mtlflashattn_finder.py": """
        import importlib.util, sys

        class _MtlFlashAttnFinder:
            def find_spec(self, fullname, path=None, target=None):
                if fullname == "flash_attn":
                    return importlib.util.spec_from_loader(fullname, self, is_package=True)

            def create_module(self, spec):
                return None

            def exec_module(self, module):
                module.__version__ = "theirs"

        sys.meta_path.append(_MtlFlashAttnFinder())
        """,
    "mtlflashattn-0.2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mtlflashattn\nVersion: 0.2.0\n",
    "mtlflashattn-0.2.0.dist-info/RECORD": "metal_flash_attn/__init__.py,,\n_mtlflashattn_finder.py,,\n",
}
NAMESAKE_HOOK = {"mtlflashattn_autoload.pth": "import _mtlflashattn_finder\n"}

#: What SuperMarioYL/flash-attn-mps installs, as far as it matters here. It has our version.
OTHER_PACKAGE = {
    "flash_attn_mps/__init__.py": "__version__ = '0.1.0'\nprint('theirs was executed')\n",
    "flash_attn_mps/interface.py": "",
    "flash_attn_mps-0.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn-mps\nVersion: 0.1.0\n",
    "flash_attn_mps-0.1.0.dist-info/RECORD": "flash_attn_mps/__init__.py,,\nflash_attn_mps/interface.py,,\n",
}

IMPORTS = """
try:
    from flash_attn import flash_attn_func
except ImportError as error:
    print(error)
"""


def doctor(interpreter, **variables):
    return json.loads(
        interpreter.run("import flash_attn_shim.commands as c; c.main(['doctor', '--json'])", **variables)
    )


def test_ours_alone_needs_no_word(with_torch):
    found = doctor(with_torch)
    line, *_behind = found["owners"]["distribution mtlflashattn"]  # the tests' own environment comes behind
    assert line == (
        f"this project: mtlflashattn 0.1.0 in {with_torch.site_packages}, with flash_attn_mps, flash_attn_shim"
    )
    (line,) = found["owners"]["package flash_attn_mps"]
    assert line == f"this project: {with_torch.site_packages}/flash_attn_mps/__init__.py"
    assert not any("another project" in advice for advice in found["advice"])
    assert with_torch.run("import flash_attn_mps") == ""


def test_an_editable_install_is_ours(tmp_path):
    """Its record names no file of the packages, only the hook and the command."""
    files = {
        "mtlflashattn-0.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mtlflashattn\nVersion: 0.1.0\n",
        "mtlflashattn-0.1.0.dist-info/RECORD": "_mtlflashattn.pth,,\nmtlflashattn.pth,,\nmtlflashattn.start,,\n",
        "mtlflashattn-0.1.0.dist-info/entry_points.txt": "[console_scripts]\nx = flash_attn_shim.commands:main\n",
        "_mtlflashattn.pth": f"{ROOT}\n",
    }
    interpreter = make_venv(tmp_path, outer=True)
    write(interpreter.site_packages, files)
    line, *_behind = doctor(interpreter)["owners"]["distribution mtlflashattn"]
    assert line == f"this project: mtlflashattn 0.1.0 in {interpreter.site_packages}"
    assert interpreter.run("import flash_attn_mps") == ""


def test_a_checkout_beside_the_namesake(tmp_path):
    """pip installed PyPI's mtlflashattn; our code runs from a checkout."""
    interpreter = make_venv(tmp_path, outer=True)
    write(interpreter.site_packages, NAMESAKE)
    # The environment that the tests run in, which comes behind, may have ours installed.
    done = interpreter.start("-c", "import flash_attn_mps", PYTHONPATH=ROOT)
    assert done.returncode == 0
    assert "UserWarning: the installed distribution mtlflashattn 0.2.0" in done.stderr
    assert f"({interpreter.site_packages})" in done.stderr
    assert "is another project of the same name" in done.stderr

    found = doctor(interpreter, PYTHONPATH=ROOT)
    theirs = f"ANOTHER PROJECT: mtlflashattn 0.2.0 in {interpreter.site_packages}, with metal_flash_attn"
    assert found["owners"]["distribution mtlflashattn"][0] == theirs
    assert found["system"]["mtlflashattn"] != "0.2.0"
    (advice,) = (advice for advice in found["advice"] if "mtlflashattn 0.2.0" in advice)
    assert "pip uninstall mtlflashattn, then install this project from its checkout or wheel" in advice


def test_the_namesakes_hook_is_named(installed, tmp_path):
    """It stands behind ours on sys.meta_path and gives flash_attn, as a real installation would."""
    write(tmp_path, NAMESAKE)
    program = "import _mtlflashattn_finder, {0}; print({0}.__version__)"
    done = installed.start("-c", program.format("flash_attn"), PYTHONPATH=tmp_path, **ON)
    assert done.stdout == "theirs\n"
    assert done.stderr.count("UserWarning") == 1
    hook = "_mtlflashattn_finder._MtlFlashAttnFinder"
    assert f"flash_attn comes from the import hook {hook} ({tmp_path}/_mtlflashattn_finder.py)" in done.stderr
    program = "import _mtlflashattn_finder, flash_attn_shim; print(flash_attn_shim.status().names[0])"
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == (
        f"Name(name='flash_attn', visible=False, origin='{tmp_path}/_mtlflashattn_finder.py', "
        f'why="the import hook {hook} presents it, which is not this project\'s")'
    )


def test_another_flash_attn_mps_first_on_the_path(with_torch, tmp_path):
    write(tmp_path, OTHER_PACKAGE)
    theirs = f"{tmp_path}/flash_attn_mps/__init__.py"
    sentence = f"`import flash_attn_mps` finds {theirs}, which belongs to flash-attn-mps 0.1.0, not to mtlflashattn"
    said = with_torch.run(IMPORTS, PYTHONPATH=tmp_path, **ON)  # and theirs was not executed
    assert said == (
        f"flash_attn (presented by mtlflashattn) cannot be served: {sentence}: pip uninstall flash-attn-mps."
    )
    said = with_torch.run("import flash_attn_mps\n" + IMPORTS, PYTHONPATH=tmp_path, **ON)
    assert sentence in said.splitlines()[1]

    found = doctor(with_torch, PYTHONPATH=tmp_path, **ON)
    assert found["owners"]["package flash_attn_mps"][0].startswith(f"ANOTHER PROJECT: {sentence}")
    assert f"{sentence}: pip uninstall flash-attn-mps." in found["advice"]
    assert sentence in found["attention"]["tier"]


def test_a_bare_directory_first_on_the_path_names_ours(with_torch, tmp_path):
    """A checkout of the other project on PYTHONPATH: there is no distribution to uninstall."""
    write(tmp_path, {"flash_attn_mps/__init__.py": ""})
    said = with_torch.run(IMPORTS, PYTHONPATH=tmp_path, **ON)
    assert f"remove {tmp_path}/flash_attn_mps/__init__.py, or put {with_torch.site_packages} first on sys.path" in said


@pytest.mark.parametrize("command", [["selftest", "--quick"], ["bench"], ["tune"], ["demo"]])
def test_commands_say_it_and_end(with_torch, tmp_path, command):
    write(tmp_path, OTHER_PACKAGE)
    done = with_torch.start("-m", "flash_attn_shim", *command, PYTHONPATH=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mtlflashattn cannot run here: `import flash_attn_mps` finds ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_both_wrote_into_one_directory(wheel, tmp_path, last):
    interpreter = make_venv(tmp_path, wheel, outer=True)
    ours = (interpreter.site_packages / "flash_attn_mps/__init__.py").read_text()
    write(interpreter.site_packages, OTHER_PACKAGE)
    found_at = f"{interpreter.site_packages}/flash_attn_mps"
    if last == "ours":
        (interpreter.site_packages / "flash_attn_mps/__init__.py").write_text(ours)
        found = doctor(interpreter, **ON)
        lines = found["owners"]["package flash_attn_mps"]
        assert lines[0] == f"this project: {found_at}/__init__.py"
        assert lines[1].startswith("also installed by another project: flash-attn-mps 0.1.0 in ")
        assert len(lines) == 2
        (advice,) = (advice for advice in found["advice"] if "flash-attn-mps" in advice)
        assert advice.startswith(f"flash-attn-mps 0.1.0 installs a package flash_attn_mps too, in {found_at}.")
        assert interpreter.run("from flash_attn import flash_attn_func", **ON) == ""
    else:
        sentence = f"{found_at}/__init__.py was overwritten by flash-attn-mps 0.1.0: pip uninstall flash-attn-mps"
        assert sentence in interpreter.run(IMPORTS, **ON)
        assert f"{sentence}, and install mtlflashattn again." in doctor(interpreter, **ON)["advice"]


def test_looking_a_name_up_reads_no_metadata(installed, fake_torch):
    """Whose the names are is examined when a presented function is taken, not before."""
    program = """
    import importlib.util, sys
    importlib.util.find_spec("flash_attn"), importlib.util.find_spec("flash_attn_interface")
    import flash_attn
    print([name for name in sys.modules if "owners" in name or name == "flash_attn_mps"])
    """
    assert installed.run(program, PYTHONPATH=fake_torch, **ON) == "[]"


def test_our_package_has_the_mark():
    """`owners` knows our package by a line of its source."""
    assert owners._MARK in (ROOT / "flash_attn_mps/__init__.py").read_text()
    assert owners.foreign_package() is None
