"""What `importlib.metadata` says about flash-attn, and that it says everything else as before."""

import importlib.util
from pathlib import Path

import pytest

from .environments import MAC, make_venv, write

ON = {"MTLFLASHATTN_SHIM": "on"}

ASK = """
import importlib.metadata as m
try:
    version = m.version("flash_attn")
except m.PackageNotFoundError:
    version = None
print(version, m.packages_distributions().get("flash_attn"), sum(d.name == "flash-attn" for d in m.distributions()))
"""

NOTHING = "None None 0"

REAL = {
    "flash_attn-2.7.4.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.7.4\n",
    "flash_attn-2.7.4.dist-info/top_level.txt": "flash_attn\n",
}


def test_the_record(installed):
    program = """
    import importlib.metadata as m
    for name in ("flash-attn", "flash_attn", "Flash-Attn", "flash.attn"):
        assert m.version(name) == "2.8.3", name
    mapping = m.packages_distributions()
    assert mapping["flash_attn"] == mapping["flash_attn_interface"] == ["flash-attn"]
    distribution = m.distribution("flash_attn")
    assert distribution.metadata["Name"] == "flash-attn"
    assert not distribution.entry_points and not distribution.requires
    files = {str(path) for path in distribution.files}
    assert {"flash_attn/__init__.py", "flash_attn_interface.py"} <= files
    assert all(path.locate().is_file() for path in distribution.files)
    for name in ("flash-attn-3", "flash_attn_3", "flash-attn-4", "flash_attn_2_cuda", "triton-that-is-not"):
        assert not list(m.distributions(name=name)), name
    """
    assert installed.run(program, **ON) == ""


@pytest.mark.parametrize(
    ("variables", "announced"),
    [
        ({}, True),
        ({"MTLFLASHATTN_SHIM": "off"}, False),
        ({"MTLFLASHATTN_TRANSFORMERS": "off"}, False),
        ({"MTLFLASHATTN_SHIM_MODULES": "flash_attn"}, True),
        ({"MTLFLASHATTN_SHIM_MODULES": "flash_attn_interface"}, False),
    ],
)
def test_announced_exactly_while_flash_attn_may_be_seen(installed, variables, announced):
    assert installed.run(ASK, **{**ON, **variables}) == ("2.8.3 ['flash-attn'] 1" if announced else NOTHING)


def test_not_announced_off_a_mac_or_without_torch(installed, fake_torch):
    assert installed.run(MAC + ASK) == NOTHING
    assert installed.run(MAC + ASK, PYTHONPATH=fake_torch) == "2.8.3 ['flash-attn'] 1"
    assert installed.run(MAC.replace("arm64", "x86_64") + ASK, PYTHONPATH=fake_torch) == NOTHING


def test_only_presented_names_are_in_top_level(installed, tmp_path):
    program = "import importlib.metadata as m; print(m.distribution('flash-attn').read_text('top_level.txt').split())"
    assert installed.run(program, **ON) == "['flash_attn', 'flash_attn_interface']"
    assert installed.run(program, MTLFLASHATTN_SHIM_MODULES="flash_attn", **ON) == "['flash_attn']"
    write(tmp_path, {"flash_attn_interface.py": ""})
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == "['flash_attn']"


def test_a_real_distribution_wins_from_pythonpath(installed, tmp_path):
    write(tmp_path, {**REAL, "flash_attn/__init__.py": ""})
    assert installed.run(ASK, PYTHONPATH=tmp_path, **ON).startswith("2.7.4 ['flash_attn'] ")


def test_metadata_without_a_module_do_not_speak_for_ours(installed, tmp_path):
    """As an uninstalled version leaves them: what is announced is the version of the module that is presented."""
    write(tmp_path, REAL)
    assert installed.run(ASK, PYTHONPATH=tmp_path, **ON).startswith("2.8.3 ")
    program = "import flash_attn, importlib.metadata as m; print(m.version('flash-attn') == flash_attn.__version__)"
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == "True"
    assert installed.run(ASK, PYTHONPATH=tmp_path, MTLFLASHATTN_SHIM="off").startswith("2.7.4 ['flash_attn'] ")


@pytest.mark.skipif(importlib.util.find_spec("pkg_resources") is None, reason="setuptools 82 has none")
@pytest.mark.parametrize("leftover", [{}, REAL])
def test_pkg_resources_sees_what_importlib_sees(with_torch, tmp_path, leftover):
    write(tmp_path, leftover)
    program = """
    import warnings
    warnings.simplefilter("ignore")
    import pkg_resources, flash_attn_shim
    def ask():
        try:
            return str(pkg_resources.require("flash-attn>=2.8")[0])
        except pkg_resources.ResolutionError as error:
            return type(error).__name__
    print(ask(), pkg_resources.get_distribution("flash_attn").version if ask()[0] == "f" else None, end=" ")
    flash_attn_shim.uninstall()
    print(ask())
    """
    without = "VersionConflict" if leftover else "DistributionNotFound"
    assert with_torch.run(program, PYTHONPATH=tmp_path, **ON) == f"flash-attn 2.8.3 2.8.3 {without}"
    off = with_torch.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_SHIM="off")
    assert off == f"{without} None {without}"


def test_a_real_module_without_metadata_has_none(installed, tmp_path):
    write(tmp_path, {"flash_attn/__init__.py": ""})
    assert installed.run(ASK, PYTHONPATH=tmp_path, **ON) == NOTHING


def test_everything_else_is_as_before(with_torch):
    program = """
    import importlib.metadata as m
    for distribution in m.distributions():
        distribution.name, distribution.version, distribution.entry_points, distribution.read_text("RECORD")
    print(sorted({d.name for d in m.distributions()} - {"flash-attn"}))
    print(sorted(map(str, m.entry_points(group="console_scripts"))))
    print({k: sorted(v) for k, v in sorted(m.packages_distributions().items()) if not k.startswith("flash_attn")})
    """
    assert with_torch.run(program, **ON) == with_torch.run(program, MTLFLASHATTN_SHIM="off")


def test_a_directory_that_is_listed_has_no_flash_attn(installed):
    """pip, pkg_resources and others go through directories one by one."""
    program = """
    import importlib.metadata as m, sys
    for path in [[entry] for entry in sys.path] + [sys.path, list(sys.path)]:
        assert "flash-attn" not in {d.name for d in m.distributions(path=path)}
    assert "mtlflashattn" in {d.name for d in m.distributions(path=sys.path)}
    """
    assert installed.run(program, **ON) == ""


def test_pip_sees_no_flash_attn(tmp_path, wheel):
    # Not imported: an imported pip keeps setuptools, which torch.utils.benchmark needs, from finding its distutils.
    pip = Path(importlib.util.find_spec("pip").origin)
    interpreter = make_venv(tmp_path, wheel)
    (interpreter.site_packages / "pip.pth").write_text(f"{pip.parents[1]}\n")
    listed = interpreter.start("-m", "pip", "list", "--path", interpreter.site_packages, **ON)
    assert "mtlflashattn" in _first_words(listed.stdout), listed.stderr
    assert "flash-attn" not in _first_words(listed.stdout)
    everything = interpreter.start("-m", "pip", "list", "--disable-pip-version-check", **ON)
    assert "flash-attn" not in _first_words(everything.stdout)
    checked = interpreter.start("-m", "pip", "check", **ON)
    assert "Traceback" not in checked.stderr
    assert "flash-attn" not in _first_words(checked.stdout)


def _first_words(text):
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def test_the_switch_counts_when_it_is_asked(installed):
    program = """
    import os, importlib.metadata as m
    for value in ("on", "off", "on"):
        os.environ["MTLFLASHATTN_SHIM"] = value
        print(len(list(m.distributions(name="flash_attn"))), end=" ")
    import flash_attn
    os.environ["MTLFLASHATTN_SHIM"] = "off"
    print(len(list(m.distributions(name="flash_attn"))))
    """
    assert installed.run(program) == "1 0 1 0"
