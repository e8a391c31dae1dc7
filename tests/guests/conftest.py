"""The environments of tests/shim."""

from tests.shim.conftest import installed, with_torch, wheel  # noqa: F401
