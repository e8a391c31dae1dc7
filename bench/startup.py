"""What the start-up hook costs: interpreter start with and without `mtlflashattn.pth`, alternating, medians.

    python bench/startup.py [rounds]

Makes two throw-away venvs of this interpreter, alike but for the hook files, so nothing needs to be installed.
"""

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_environment(directory, hook):
    """A venv without pip, in which the hook's files and the package are visible as an installation has them."""
    venv.create(directory, symlinks=True)
    site_packages = next(Path(directory, "lib").glob("python*")) / "site-packages"
    shutil.copytree(ROOT / "flash_attn_shim", site_packages / "flash_attn_shim")
    compileall.compile_dir(site_packages, quiet=1)  # as pip does
    if hook:
        for name in ("mtlflashattn.pth", "mtlflashattn.start"):
            (site_packages / name).write_text((ROOT / name).read_text())
    return Path(directory, "bin", "python")


def start(python):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=environment, check=True)
    return (time.perf_counter() - begin) * 1e3


def measure(rounds):
    """Milliseconds of each start: (without the hook, with it), alternating."""
    with tempfile.TemporaryDirectory() as directory:
        pythons = [make_environment(Path(directory, name), name == "with") for name in ("without", "with")]
        times = [[], []]
        for turn in range(rounds + 5):
            for python, column in zip(pythons, times, strict=True):
                elapsed = start(python)
                if turn >= 5:  # the first ones write and read bytecode
                    column.append(elapsed)
        return times


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    without, with_hook = map(statistics.median, measure(rounds))
    print(f"Python {sys.version.split()[0]}: {without:.2f} ms without, {with_hook:.2f} ms with the hook")
    print(f"difference {with_hook - without:+.2f} ms, ratio {with_hook / without:.3f}; the target is below 1 ms")
