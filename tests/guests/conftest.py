"""The environments of tests/shim."""

from tests.shim.conftest import installed, wheel, with_torch  # noqa: F401
