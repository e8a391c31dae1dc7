"""Interpreters with mtlflashattn installed, hook included, next to the libraries that the tests run with."""

import pytest

from tests.shim.environments import build, make_venv, write

#: What a program of these tests says on stderr must be of its own making.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Quiet:
    """An interpreter whose libraries stay quiet."""

    def __init__(self, interpreter):
        self.interpreter = interpreter

    def start(self, *arguments, **variables):
        return self.interpreter.start(*arguments, **{**QUIET, **variables})

    def run(self, program, *options, **variables):
        return self.interpreter.run(program, *options, **{**QUIET, **variables})


@pytest.fixture(scope="session")
def hooked(tmp_path_factory):
    """mtlflashattn installed as a user has it."""
    wheel = build("wheel", tmp_path_factory.mktemp("wheel"))
    return Quiet(make_venv(tmp_path_factory.mktemp("hooked"), wheel, outer=True))


@pytest.fixture(scope="session")
def without(tmp_path_factory):
    """The same libraries without mtlflashattn."""
    return Quiet(make_venv(tmp_path_factory.mktemp("without"), outer=True))


@pytest.fixture
def files(tmp_path):
    """Write a tree of files, path -> text, and return its directory."""
    return lambda tree: write(tmp_path, tree)
