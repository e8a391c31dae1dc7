"""Programs in interpreters of their own: what transformers concludes at its import can be concluded once a process.

This folder must stay without an `__init__.py`: next to other tests on sys.path, it would be the package `transformers`.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _environment(**variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MTLFLASHATTN")}
    return {**kept, **QUIET, **variables}


@functools.cache
def _server():
    """The process whose forks run the programs: see forked.py."""
    command = [sys.executable, "-W", "ignore", "forked.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, env=_environment(), cwd=HERE, text=True, **pipes)
    atexit.register(process.communicate)
    return process


def start(*arguments, **variables):
    """Run a program, `"-c", source` or `file, ...`, to its end; return what it printed."""
    environment = _environment(**variables)
    if sys.platform == "darwin":  # Apple's frameworks do not survive a fork without exec
        command = [sys.executable, "-W", "ignore", *arguments]
        done = vars(subprocess.run(command, env=environment, cwd=HERE, text=True, capture_output=True, check=False))
    else:
        server = _server()
        print(json.dumps({"arguments": arguments, "environment": environment}), file=server.stdin, flush=True)
        done = json.loads(server.stdout.readline())
    assert done["returncode"] == 0, done["stderr"]
    return done["stdout"]


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
