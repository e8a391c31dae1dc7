"""Wheel, sdist, editable install, uninstall: the hook is there afterwards, or gone."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string

import pytest

from .environments import ROOT, build, make_venv

HOOK = ("mtlflashattn.pth", "mtlflashattn.start")
STUBS = ("flash_attn-stubs", "flash_attn_interface-stubs")

GATES = """
import sys
print(sum("flash_attn_shim" in type(finder).__module__ for finder in sys.meta_path))
"""


def test_wheel_holds_the_hook_and_records_it(wheel):
    assert wheel.name == "mtlflashattn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = archive.read("mtlflashattn-0.1.0.dist-info/RECORD").decode()
        entry_points = archive.read("mtlflashattn-0.1.0.dist-info/entry_points.txt").decode()
        metadata = message_from_string(archive.read("mtlflashattn-0.1.0.dist-info/METADATA").decode())
        lines = archive.read("mtlflashattn.pth").decode().splitlines()
    recorded = {line.split(",")[0] for line in record.splitlines()}
    assert recorded == set(names)
    assert recorded >= set(HOOK)
    assert "flash_attn_shim/presents/flash_attn/__init__.py" in names
    assert {"flash_attn_shim/py.typed", "flash_attn_mps/py.typed"} <= recorded
    # Anything else at the top could collide with the real package.
    assert {name.split("/")[0] for name in names} == {
        "flash_attn_mps",
        "flash_attn_shim",
        "mtlflashattn-0.1.0.dist-info",
        *HOOK,
        *STUBS,
    }
    assert len(lines) == 1
    assert lines[0].startswith("import ")
    assert "exec" not in lines[0]
    assert "mtlflashattn = flash_attn_shim.commands:main" in entry_points
    required = {item.split(";")[0] for item in metadata.get_all("Requires-Dist") if ";" not in item}
    assert required == {"torch>=2.7", "packaging>=23", "einops>=0.7"}


def test_sdist_makes_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        archive.extractall(tmp_path / "source", filter="data") if sys.version_info >= (3, 12) else archive.extractall(
            tmp_path / "source"
        )
    again = build("wheel", tmp_path, source=next((tmp_path / "source").iterdir()))
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        assert one.read("mtlflashattn.pth") == other.read("mtlflashattn.pth")


def test_a_line_that_runs_twice_sets_one_gate(installed):
    """A venv's does (python/cpython#75723), and with .start beside it Python 3.15 could."""
    again = f"exec(open({str(installed.site_packages / 'mtlflashattn.pth')!r}).read())\n"
    assert installed.run(again + GATES) == "1"


def test_start_file_names_the_same_entry(installed):
    (entry,) = (installed.site_packages / "mtlflashattn.start").read_text().split()
    module, function = entry.split(":")
    program = f"import sys; import {module} as m; m.uninstall(); m.{function}()"
    assert installed.run(program + GATES) == "1"
    line = (installed.site_packages / "mtlflashattn.pth").read_text()
    assert f'"{module}"' in line
    assert f".{function}()" in line


@pytest.mark.parametrize("leftover", ["nothing", "empty directory", "__pycache__"])
def test_a_leftover_hook_is_silent(tmp_path, leftover):
    interpreter = make_venv(tmp_path)
    for name in HOOK:
        (interpreter.site_packages / name).write_text((ROOT / name).read_text())
    if leftover != "nothing":
        (interpreter.site_packages / "flash_attn_shim").mkdir()
    if leftover == "__pycache__":
        (interpreter.site_packages / "flash_attn_shim" / "__pycache__").mkdir()
        (interpreter.site_packages / "flash_attn_shim" / "__pycache__" / "autoload.cpython-311.pyc").write_bytes(b"")
    assert interpreter.run(GATES) == "0"


def pip(interpreter, *arguments):
    command = [sys.executable, "-m", "pip", "--python", interpreter.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(interpreter):
    return {path for path in interpreter.site_packages.rglob("*") if "__pycache__" not in path.parts}


def test_pip_installs_and_uninstalls_the_wheel_without_a_trace(wheel, tmp_path):
    interpreter = make_venv(tmp_path)
    before = files_in(interpreter)
    pip(interpreter, "install", "--no-deps", "--no-index", wheel)
    assert interpreter.run(GATES) == "1"
    pip(interpreter, "uninstall", "--yes", "mtlflashattn")
    assert files_in(interpreter) == before
    assert interpreter.run(GATES) == "0"


def test_an_editable_install_is_active_and_uninstalls(tmp_path):
    interpreter = make_venv(tmp_path, outer=True)
    before = files_in(interpreter)
    pip(interpreter, "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", ROOT)
    assert {*HOOK, *STUBS} <= {path.name for path in files_in(interpreter)}
    assert interpreter.run(GATES) == "1"
    found = interpreter.run("import flash_attn; print(flash_attn.__file__)", MTLFLASHATTN_SHIM="on")
    assert found == str(ROOT / "flash_attn_shim/presents/flash_attn/__init__.py")
    pip(interpreter, "uninstall", "--yes", "mtlflashattn")
    assert files_in(interpreter) == before
