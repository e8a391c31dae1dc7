"""What the hook costs programs that do not ask: importing 500 modules with and without it, alternating, medians.

    python bench/import_overhead.py [rounds]

Makes two throw-away venvs of this interpreter, alike but for the hook files. Most of the cost is importlib's own, which
takes a lock for each finder.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from startup import make_environment

COUNT = 500

# Modules as programs have them, of 50 to 800 lines: copies of these of the standard library.
SAMPLES = ("bisect", "calendar", "colorsys", "csv", "fnmatch", "graphlib", "heapq", "sched", "shlex", "textwrap")

TIME = """
import sys, time
sys.path.insert(0, {directory!r})
begin = time.process_time()
for number in range({count}):
    __import__(f"unrelated_{{number}}")
print(time.process_time() - begin)
"""


def measure(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of CPU for the imports, a list without the hook and one with it."""
    times: tuple[list[float], list[float]] = [], []
    with tempfile.TemporaryDirectory() as directory:
        modules = Path(directory, "modules")
        modules.mkdir()
        for number in range(COUNT):
            sample = importlib.util.find_spec(SAMPLES[number % len(SAMPLES)])
            (modules / f"unrelated_{number}.py").write_text(Path(sample.origin).read_text())
        pythons = [make_environment(Path(directory, name), name == "with") for name in ("without", "with")]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        for turn in range(rounds + 2):
            for python, column in zip(pythons, times, strict=True):
                program = TIME.format(directory=str(modules), count=COUNT)
                environment = {**kept, "MTLFLASHATTN_SHIM": "on"}
                done = subprocess.run(
                    [python, "-c", program], env=environment, check=True, capture_output=True, text=True
                )
                if turn >= 2:  # the first ones write and read bytecode
                    column.append(float(done.stdout))
    return times


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    without, with_hook = measure(rounds)
    one, other = statistics.median(without), statistics.median(with_hook)
    print(f"{COUNT} imports: {one * 1e3:.2f} ms of CPU without, {other * 1e3:.2f} ms with the hook")
    print(
        f"difference {other / one - 1:+.2%} (of the fastest {min(with_hook) / min(without) - 1:+.2%}); the target is 1%"
    )
