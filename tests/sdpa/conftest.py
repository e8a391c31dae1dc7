import os
import threading

import pytest
import torch

from flash_attn_mps import mha, sdpa
from flash_attn_mps.sdpa import obstacles, registration, settings
from flash_attn_mps.sdpa.settings import GIB, Settings
from flash_attn_mps.tiers.metal import store, variants
from tests.metal_tiers import metal_on


@pytest.fixture(autouse=True)
def _anew(monkeypatch, tmp_path):
    """Random numbers, counters and settings from the beginning; afterwards nothing is installed."""
    for name in [name for name in os.environ if name.startswith("MTLFLASHATTN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    variants.forget()
    torch.manual_seed(0)
    sdpa.reset()
    threads = threading.active_count()  # torch.compile and others leave some
    monkeypatch.setattr(registration, "_is_alone", lambda: threading.active_count() <= threads)
    yield
    monkeypatch.setattr(registration, "_is_alone", lambda: True)
    sdpa.uninstall()
    mha.uninstall()
    sdpa.reset()
    variants.forget()


@pytest.fixture
def given(monkeypatch):
    """given(torch=(2, 12), ...): the settings that hold from now on."""

    def given(torch=(2, 13), budget=4 * GIB, **others):
        monkeypatch.setattr(settings, "read", lambda: Settings(torch, budget, **others))
        sdpa.reset()

    return given


@pytest.fixture
def as_mps(monkeypatch, given):
    """The CPU counts as MPS, for the dispatcher too, and every call is taken for the sake of speed or its hazards."""
    monkeypatch.setattr(obstacles, "DEVICE", "cpu")
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "torch")
    given(torch=(2, 7), min_seq=0, fast_min_seq=0)


@pytest.fixture
def metal(monkeypatch, as_mps):
    """`as_mps`, and the Metal kernels serve CPU tensors, on the runner."""
    monkeypatch.delenv("MTLFLASHATTN_KERNEL")
    with metal_on("cpu"):
        yield


@pytest.fixture(params=["torch", "metal"])
def tier(request):
    """Both tiers that serve calls on a Mac, in turn."""
    request.getfixturevalue("as_mps" if request.param == "torch" else "metal")
    return request.param
