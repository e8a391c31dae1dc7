import os

import pytest
import torch

from flash_attn_mps.tiers.metal import store, variants
from tests.metal_tiers import metal_on


@pytest.fixture(autouse=True, scope="package")
def _metal_on_the_cpu(tmp_path_factory):
    """The runner in the place of torch.mps.compile_shader, for tensors on the CPU; nothing forced, nothing tuned."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MTLFLASHATTN_")]:
            patch.delenv(name)
        patch.setenv(store.CACHE, str(tmp_path_factory.mktemp("cache")))
        variants.forget()
        with metal_on("cpu"):
            yield
        variants.forget()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
