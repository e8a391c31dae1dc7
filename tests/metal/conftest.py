import pytest
import torch

from flash_attn_mps.metal import compiler
from tests.metal_host import compile_shader


@pytest.fixture(autouse=True, scope="package")
def _metal_on_the_cpu():
    """The runner in the place of torch.mps.compile_shader, for tensors on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile_shader", compile_shader)
        patch.setattr(compiler, "device_types", frozenset({"cpu"}))
        compiler.clear()
        yield
        compiler.clear()


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
