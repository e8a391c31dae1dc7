import pytest
import torch

from tests.threads import one_thread  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
