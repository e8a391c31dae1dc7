import pytest
import torch


@pytest.fixture
def device(request):
    """Where the kernels run: the CPU, or with `--metal-device cuda` an NVIDIA GPU."""
    name = request.config.getoption("--metal-device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--metal-device cuda: torch sees no GPU")
    return name
