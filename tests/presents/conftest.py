import pytest
import torch

from .processes import Pool

# Many small operations: more threads only wait for each other.
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def pool():
    """Four processes that gloo joins, started when the first test asks for them."""
    with Pool(4) as pool:
        yield pool
