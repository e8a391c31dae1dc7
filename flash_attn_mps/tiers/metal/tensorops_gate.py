"""Whether this machine has what the tier `tensorops` needs, as far as it is known without asking the GPU.

The gates in their order: macOS, torch, the GPU. Behind them `tensorops_probe.py` compiles a kernel and runs it.
"""

from __future__ import annotations

import functools
import os
import platform
import re

import torch

from ..tier import FORCE
from . import gpu

NAME = "tensorops"
MACOS = (26, 2)  # cooperative tensors as operands, which a kernel fills itself
TORCH = (2, 11)  # asks for Metal 4, without which the headers are empty (pytorch#172230)
# Matrix units stand beside the ALUs from the GPUs of the family Apple10 on: M5, and A19.
_GENERATION, _PHONE_GENERATION = 5, 19


@functools.cache
def unmet() -> tuple[str, ...]:
    """Which macOS and torch it needs and does not have here, in words; empty if it has them."""
    reasons, macos = [], gpu.macos()
    if _numbers(macos) < MACOS:
        here = f"macOS {macos}" if macos else platform.system()
        reasons.append(f"needs macOS {_text(MACOS)} or later, and this is {here}")
    if _numbers(torch.__version__) < TORCH:
        reasons.append(f"needs torch {_text(TORCH)} or later, which compiles Metal 4, and this is {torch.__version__}")
    return tuple(reasons)


@functools.cache
def unsuited() -> tuple[str, ...]:
    """Why the tier is not worth it on this GPU, in words; empty if it is, as on M5 and later.

    On other GPUs its kernels run on the ALUs: where they are asked for, or `mtlflashattn tune` found them faster.
    """
    if gpu.is_virtual():
        return ("the GPU is that of a virtual machine",)
    if gpu.generation() >= _GENERATION or gpu.phone_generation() >= _PHONE_GENERATION:
        return ()
    return (f"the GPU ({gpu.name() or 'unknown'}) has no matrix units beside its ALUs, as M5 and later do",)


def is_forced() -> bool:
    """Does `MTLFLASHATTN_KERNEL` ask for this tier?"""
    return os.environ.get(FORCE, "").lower() == NAME


def forget() -> None:
    """Look at the machine anew."""
    unmet.cache_clear()
    unsuited.cache_clear()


def _numbers(version: str) -> tuple[int, int]:
    """(26, 2) of "26.2.1"; (0, 0) of what is no version."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found.group(1)), int(found.group(2) or 0)) if found else (0, 0)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
