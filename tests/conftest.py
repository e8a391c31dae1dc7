import pytest


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
