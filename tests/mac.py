"""A Mac where there is none, as far as the product asks about it: `sysctl`, torch's version, the number of cores."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from flash_attn_mps.tiers.metal import gpu, tensorops_probe

_CACHED = (
    gpu.name,
    gpu.cores,
    gpu.generation,
    gpu.phone_generation,
    gpu.is_virtual,
    gpu.os_build,
    gpu.macos,
    gpu._brand,
)


@contextlib.contextmanager
def mac(
    chip: str = "Apple M5 Max", macos: str = "26.2", build: str = "25C56", torch_version: str = "2.14.1"
) -> Iterator:
    """This machine is a Mac of this kind. Gives the `MonkeyPatch` that undoes it."""
    answers = {"machdep.cpu.brand_string": chip, "kern.osproductversion": macos, "kern.osversion": build}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_sysctl", lambda name: answers[name])
        patch.setattr(torch, "__version__", torch_version)
        _ask_anew()
        try:
            yield patch
        finally:
            _ask_anew()


def _ask_anew() -> None:
    for function in _CACHED:
        function.cache_clear()
    tensorops_probe.forget()
