"""A program that PyInstaller freezes: the hook in the wheel takes along what nothing imports by name; children work.

torch is left out of the build, which would take minutes, and found where the tests have it.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("PyInstaller")

PROGRAM = """
import sys
sys.path += {paths!r}
import flash_attn_shim
flash_attn_shim.install()
import multiprocessing
import torch
from flash_attn import flash_attn_func
from flash_attn.bert_padding import unpad_input
import flash_attn.modules.mha, flash_attn_interface

def work(function):
    q = torch.ones(1, 4, 2, 8)
    return function(q, q, q).sum().item()

if __name__ == "__main__":
    multiprocessing.freeze_support()
    from flash_attn_mps.tiers.metal import specialization
    assert flash_attn_func.__module__ == "flash_attn.flash_attn_interface"
    assert flash_attn.__file__.startswith(sys._MEIPASS) and specialization.__file__.startswith(sys._MEIPASS)
    print(len(list(specialization._KERNELS.glob("*.metal"))), work(flash_attn_func), end=" ")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply_async(work, (flash_attn_func,)).get(120))
"""

OUTSIDE = ("torch", "numpy", "einops", "transformers", "packaging")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("frozen")
    origins = [Path(importlib.util.find_spec(name).origin).parents[1] for name in OUTSIDE]
    paths = [sysconfig.get_path("stdlib"), f"{sysconfig.get_path('stdlib')}/lib-dynload", *map(str, origins)]
    (directory / "program.py").write_text(PROGRAM.format(paths=list(dict.fromkeys(paths))))
    excluded = [word for name in OUTSIDE for word in ("--exclude-module", name)]
    command = [sys.executable, "-m", "PyInstaller", "--onedir", "--noconfirm", *excluded, "program.py"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory / "dist" / "program" / "program"


def test_it_runs(frozen, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    done = subprocess.run([frozen], capture_output=True, text=True, check=False, timeout=300)
    kernels = len(list((Path(__file__).parents[3] / "flash_attn_mps/tiers/metal/kernels").glob("*.metal")))
    assert done.stdout.split() == [str(kernels), "64.0", "64.0"], done.stdout + done.stderr


def test_without_the_files_it_says_so(frozen, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    presents = next(frozen.parent.rglob("presents"))
    presents.rename(presents.with_name("elsewhere"))
    done = subprocess.run([frozen], capture_output=True, text=True, check=False, timeout=300)
    presents.with_name("elsewhere").rename(presents)
    assert done.returncode != 0
    assert "ImportError: flash_attn_shim.install(): files of mtlflashattn are missing: " in done.stderr
