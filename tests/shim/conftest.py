"""The built wheel, and environments it is installed in: once a session."""

import pytest

from .environments import build, make_venv, write


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory, wheel):
    """mtlflashattn installed, no torch, nothing else. Tests must not write to it."""
    return make_venv(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="session")
def with_torch(tmp_path_factory, wheel):
    """mtlflashattn installed, next to everything the tests' own environment has. Tests must not write to it."""
    return make_venv(tmp_path_factory.mktemp("with_torch"), wheel, outer=True)


@pytest.fixture
def fake_torch(tmp_path):
    """A directory for PYTHONPATH in which `import torch` works and costs nothing."""
    return write(tmp_path / "fake_torch", {"torch/__init__.py": "__version__ = '2.13.0'\n"})


@pytest.fixture
def broken_torch(tmp_path):
    """A directory for PYTHONPATH in which torch is found and `import torch` raises OSError."""
    return write(tmp_path / "broken_torch", {"torch/__init__.py": "raise OSError('libtorch_cpu.dylib: not loaded')\n"})
