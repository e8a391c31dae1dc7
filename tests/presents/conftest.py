import pytest

from .processes import Pool


@pytest.fixture(scope="session")
def pool():
    """Four processes that gloo joins, started when the first test asks for them."""
    with Pool(4) as pool:
        yield pool
