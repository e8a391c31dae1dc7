import contextlib

import pytest
import torch

from flash_attn_mps import checks
from flash_attn_mps.tiers import METAL
from flash_attn_mps.tiers.metal import decode, store, variants
from tests.mac import mac
from tests.metal_tiers import decode_serves_all, metal_on

# Forced tier and variant: "auto" is what a CPU tensor gets, the cpu tier wherever that serves the call; "M5", what
# one gets on a Mac with tensor operations.
M5 = "M5"
TIERS = {
    "auto": (None, None),
    "torch": ("torch", None),
    "simdgroup direct": ("simdgroup", "8x2x16-direct"),
    "simdgroup staged": ("simdgroup", "8x2x16-staged"),
    "scalar": ("scalar", None),
    "decode": ("decode", None),
    M5: (None, None),
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.metal_full] if name == M5 else []) for name in TIERS])
def tier(request, monkeypatch, tmp_path):
    """Every tier in turn; the Metal ones on the runner."""
    kernel, variant = TIERS[request.param]
    wanted = {"MTLFLASHATTN_KERNEL": kernel, "MTLFLASHATTN_VARIANT": variant, store.CACHE: str(tmp_path)}
    for name, value in wanted.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    variants.forget()
    if kernel == decode.TIER.name:
        decode_serves_all(monkeypatch)
    torch.manual_seed(0)
    with contextlib.ExitStack() as machine:
        if request.param == M5:
            machine.enter_context(mac())
            machine.enter_context(metal_on("cpu", version="4.0"))
        elif kernel in METAL:
            machine.enter_context(metal_on("cpu"))
        yield request.param
    variants.forget()


@pytest.fixture(params=["host", "device"])
def read_by(request, monkeypatch):
    """Whether the host can read values for free, as those of CPU tensors, or would wait for a device."""
    if request.param == "device":
        monkeypatch.setattr(checks, "readable", lambda tensor: False)
    return request.param
