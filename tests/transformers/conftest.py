"""Programs in interpreters of their own: what transformers concludes at its import can be concluded once a process.

This folder must stay without an `__init__.py`: next to other tests on sys.path, it would be the package `transformers`.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def start(*arguments, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MTLFLASHATTN")}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**kept, **quiet, **variables},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def run():
    """Run a program (dedented source), in whose folder `tiny` can be imported; return what it printed."""
    return lambda program, **variables: start("-c", textwrap.dedent(program), **variables).strip()


@pytest.fixture(scope="session")
def tiny_models():
    """attention -> results of `tiny.py`, each run once."""
    results = {}

    def of(implementation):
        if implementation not in results:
            switch = "on" if implementation == "flash_attention_2" else "off"
            printed = start("tiny.py", implementation, MTLFLASHATTN_SHIM=switch)
            results[implementation] = json.loads(printed.splitlines()[-1])
        return results[implementation]

    return of
