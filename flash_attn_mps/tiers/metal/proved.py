"""Which kernels have proved themselves on this machine: a file in the user's cache directory, a line for each.

A line is a digest of everything that the compiled code depends on. Lines of another torch, macOS or GPU, or of sources
that have changed, say nothing about what is here, and are left where they are. A line is appended in one write, so that
processes need not wait for each other.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch

from . import gpu, refusals, store

PROVE = "MTLFLASHATTN_PROVE"
_CHOICES = ("off", "once", "always")
_TRIALS = 2  # counts up when trials change: what passed the old ones proves itself again
_known: set[str] | None = None  # None: the file has not been read
_unknown: set[str] = set()  # values of the variable that are no choice


def wanted(default: str = "once") -> str:
    """`MTLFLASHATTN_PROVE`: off, once (a machine) or always (in every process)."""
    choice = os.environ.get(PROVE, default).lower()
    if choice in _CHOICES:
        return choice
    if choice not in _unknown:
        _unknown.add(choice)
        known = ", ".join(_CHOICES)
        warnings.warn(f"{PROVE}={choice} is not known; it counts as {default}. Known: {known}.", stacklevel=2)
    return default


def digest(source: str, compiler: str) -> str:
    """Of a kernel's source and all else that decides what it is compiled to. `compiler`: who compiles it."""
    parts = (str(_TRIALS), source, compiler, *_machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _machine() -> tuple[str, ...]:
    return gpu.name(), gpu.os_build(), torch.__version__, os.environ.get(refusals.FAST_MATH, "")


def holds(line: str) -> bool:
    """Has a kernel of that digest passed, here or in an earlier process?"""
    global _known
    if _known is None:
        try:
            _known = set(_file().read_text(encoding="ascii", errors="replace").split())
        except OSError:
            _known = set()
    return line in _known


def remember(line: str) -> None:
    """It has. Where nothing can be written, every process proves anew."""
    if not holds(line):
        assert _known is not None
        _known.add(line)
        try:
            _file().parent.mkdir(parents=True, exist_ok=True)
            with open(_file(), "a", encoding="ascii") as file:
                file.write(f"\n{line}")  # whatever the last line is
        except OSError:
            pass


def forget() -> None:
    """Read the file again when it is next needed."""
    global _known
    _known = None
    _unknown.clear()


def _file() -> Path:
    return store.directory() / "proved.txt"
