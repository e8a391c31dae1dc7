"""Which GPU this is."""

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


@functools.cache
def generation() -> int:
    """The number in "Apple M3 Max"; 0 where there is none to be found."""
    found = re.search(r"Apple M(\d+)", _brand())
    return int(found.group(1)) if found else 0


@functools.cache
def cores() -> int:
    """How many cores it has; 10, as most have or more, where that is not to be found."""
    found = re.search(r", (\d+) cores", name())
    return int(found.group(1)) if found else 10


@functools.cache
def _brand() -> str:
    try:
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()
