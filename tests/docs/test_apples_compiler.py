"""What the workflow `metal` runs on a Mac: the sources that it writes, the script that compiles them, whose failures
are whose. Apple's compiler is a stand-in here."""

import importlib.util
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from flash_attn_mps.tiers import metal
from flash_attn_mps.tiers.metal.kernel import Program
from metal_host import compile_shader

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources():
    return script("metal_sources")


@pytest.fixture(scope="module")
def few(sources):
    """Of one dtype and head dim."""
    return sources.specializations(c for c in sources.listed() if (c.dtype, c.head_dim) == ("float16", 64))


def test_the_list_has_every_kernel(few):
    modules = [import_module(f"{metal.__name__}.{found.name}") for found in pkgutil.iter_modules(metal.__path__)]
    values = [value for module in modules for value in vars(module).values()]
    values += [kernel for value in values if isinstance(value, dict) for kernel in value.values()]
    kernels = {value.entry for value in values if isinstance(value, Program)}
    assert {s.kernel.entry for s in few} == kernels


def test_the_list_has_every_dtype_and_kind_of_call(sources):
    listed = list(sources.listed())
    assert {case.dtype for case in listed} == {"float16", "bfloat16", "float32"}
    assert {case.head_dim for case in listed} >= {32, 64, 80, 96, 128, 192, 256}
    assert {case.feature for case in listed} >= set(sources.FEATURES)


def test_it_writes_a_file_for_each(sources, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "specializations", lambda _cases: few)
    sources.main(tmp_path / "folder")
    files = sorted((tmp_path / "folder").iterdir())
    assert len(files) == len({s.source() for s in few}) + 1 > 50  # and the probe of tensor operations
    assert f"{len(files) - 1} sources" in capsys.readouterr().out
    assert len({file.name for file in files}) == len(files)
    texts = [file.read_text(encoding="ascii") for file in files]
    # As the compiler gets them: the runner, which stands for it, finds the kernel in the file.
    for version in ("3.1", "4.0"):
        of_version = [n for n, file in enumerate(files) if file.name.endswith(".metal4.metal") == (version == "4.0")]
        smallest = min(of_version, key=lambda n: len(texts[n]))
        library = compile_shader(texts[smallest], version=version)
        assert dir(library) == [files[smallest].name.partition("-")[0]]


COMPILER = """#!/usr/bin/env python3
import sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
text = open(sys.argv[-1]).read()
sys.exit("error: no member named 'x'" if "wrong" in text and "-std=metal3.1" in sys.argv else 0)
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_every_file_is_compiled_for_every_version(wrong, tmp_path):
    log, compiler, folder = tmp_path / "log", tmp_path / "metal", tmp_path / "folder"
    compiler.write_text(COMPILER.format(log=str(log)))
    folder.mkdir()
    for name in ("a.metal", "b c.metal", "d.metal", "e.metal4.metal"):
        (folder / name).write_text("wrong" if wrong and name == "a.metal" else "right")
    run = subprocess.run(
        ["bash", ROOT / ".ci/compile_metal", folder],
        env={**os.environ, "COMPILER": f"{sys.executable} {compiler}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode != 0) == wrong, run.stderr
    assert ("no member named 'x'" in run.stderr) == wrong
    lines = log.read_text().splitlines()
    assert len(lines) == 10, "after a failure too"
    for version, files in (("3.1", 3), ("3.2", 3), ("4.0", 4)):
        assert sum(f"-std=metal{version} " in line for line in lines) == files
        failed = wrong and version == "3.1"
        assert f"Metal {version}: {'FAILED' if failed else 'all files compile'}" in run.stdout


@pytest.mark.parametrize(
    ("status", "unusable", "virtual", "code", "kind"),
    [
        (0, None, False, 0, "notice"),
        (0, None, True, 0, "notice"),
        (1, None, False, 1, "error"),
        (1, None, True, 0, "warning"),
        (1, "MPS backend out of memory", True, 0, "warning"),
        (1, "MPS is not available", False, 1, "error"),
    ],
)
def test_failures_of_a_virtual_gpu_are_not_ours(status, unusable, virtual, code, kind):
    found, line = script("selftest_on_mps").verdict(status, unusable, virtual)
    assert found == code
    assert line.startswith(f"::{kind}::")
    assert unusable is None or unusable in line
