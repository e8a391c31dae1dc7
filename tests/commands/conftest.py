import pytest
import torch

from flash_attn_mps.tiers.metal import few, variants
from tests.metal_tiers import metal_on


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and variants chosen anew."""
    monkeypatch.setenv("MTLFLASHATTN_CACHE", str(tmp_path))
    for name in ("MTLFLASHATTN_VARIANT", "MTLFLASHATTN_TUNE"):
        monkeypatch.delenv(name, raising=False)
    variants.forget()
    few.forget()
    yield tmp_path
    variants.forget()
    few.forget()


@pytest.fixture
def metal():
    """The Metal tiers serve CPU tensors, on the runner."""
    with metal_on("cpu"):
        yield
