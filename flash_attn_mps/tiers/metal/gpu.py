"""Which GPU this is, and under which macOS."""

from __future__ import annotations

import functools
import re
import subprocess

import torch


@functools.cache
def name() -> str:
    """Like "Apple M3 Max, 40 cores"; empty where there is no Apple GPU to be found."""
    chip = _brand()
    if not chip.startswith("Apple"):
        return ""
    count = getattr(torch.backends.mps, "get_core_count", None)  # torch 2.9 and later
    if count is None or not torch.backends.mps.is_available():
        return chip
    return f"{chip}, {count()} cores"  # one name is sold with different numbers of cores


_UNKNOWN_CORES = 16  # between an M1 and an M4 Max


@functools.cache
def cores() -> int:
    """How many cores it has: what runs at a time is so many times what one core runs."""
    count = getattr(torch.backends.mps, "get_core_count", None)
    return count() if count is not None and torch.backends.mps.is_available() else _UNKNOWN_CORES


@functools.cache
def generation() -> int:
    """The number in "Apple M3 Max"; 0 where there is none to be found."""
    return _number_after("M")


@functools.cache
def phone_generation() -> int:
    """The number in "Apple A18 Pro", a phone's chip, which Macs have too; 0 where there is none to be found."""
    return _number_after("A")


def _number_after(letter: str) -> int:
    found = re.search(rf"Apple {letter}(\d+)", _brand())
    return int(found.group(1)) if found else 0


@functools.cache
def is_virtual() -> bool:
    """Is it that of a virtual machine (Apple Paravirtual device), as on the hosted runners of CI services?

    Kernels that work on every Mac fail there: genesis-world#3054.
    """
    return "virtual" in _brand().lower()


@functools.cache
def os_build() -> str:
    """macOS's build, like "25B78": two builds of one version may compile a kernel differently. Elsewhere empty."""
    return _sysctl("kern.osversion") if _brand().startswith("Apple") else ""


@functools.cache
def macos() -> str:
    """macOS's version, like "26.2"; elsewhere empty.

    Not `platform.mac_ver()`: a Python that was built before macOS 26 gets a version of the old scheme there, 16
    (python/cpython#135675). `sysctl` is macOS's own, and says what there is.
    """
    return _sysctl("kern.osproductversion") if _brand().startswith("Apple") else ""


@functools.cache
def _brand() -> str:
    return _sysctl("machdep.cpu.brand_string")


def _sysctl(name: str) -> str:
    try:
        asked = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()
