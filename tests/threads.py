"""A fixture for the conftest.py of a package: one thread for its tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Most tensors here are small; on a shared machine the threads of an OpenMP team would spend the time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
