"""All tests: how pytest-xdist spreads them, and what none of them may see or change.

pyproject.toml asks for a worker a core (`-n logical`) and for `--dist loadfile`: all tests of a file run in one
worker, in order, so that a module's fixture (compiled kernels, a process that has imported transformers) is made
once. A session's fixture is made once in each worker that asks for it. Therefore:

* A test passes in any worker, after any other file: it leaves no global state behind, writes below `tmp_path`, takes
  free ports, and does not count on a warning that Python shows once a process.
* A file that takes more than about ten seconds stands in SLOW, or is two files: started last, it would keep one core
  busy while the others wait. `pytest --durations=20` shows what is slow.
* Parameters come in the same order in every process: no sets, no `id()`.

`pytest -n 0` runs everything in this process, as does naming one file or tests of it: there `-s` and a debugger work.
"""

import gc
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

#: Files and folders that are started first, in this order.
SLOW = [
    TESTS / name
    for name in ("transformers", "neighbours", "metal", "commands/test_report.py", "attention/test_compile.py")
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Of one file a second worker would get nothing, so no worker is started for it."""
    files = {config.invocation_params.dir / argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().is_file() else None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: the garbage collector need not look at it, now or during a test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((n for n, slow in enumerate(SLOW) if item.path.is_relative_to(slow)), len(SLOW))
        )


def pytest_addoption(parser):
    parser.addoption(
        "--metal-device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where tests/test_metal_host runs its Metal kernels",
    )


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory):
    """What was tuned on this machine changes no test, and no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTLFLASHATTN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Most tensors here are small: an OpenMP team would spend the time waiting, and sum in another order elsewhere."""
    import torch

    torch.set_num_threads(1)
