"""Compiled kernels on disk, by content: a key is the hash of all that went in, so nothing is ever stale."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """METAL_HOST_CACHE, or this user's cache directory."""
    if chosen := os.environ.get("METAL_HOST_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mtlflashattn" / "metal_host"


def key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def fetch(key: str, names: tuple[str, ...], build: Callable[[Path], None]) -> list[Path]:
    """The files `names` of an entry. If it is not there, `build` writes them into a directory it is given.

    Processes may build one entry at the same time: each in a directory of its own, and the first rename wins.
    """
    entry = directory() / key[:2] / key
    if not entry.is_dir():
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix="building-") as scratch:
            made = Path(scratch) / "entry"
            made.mkdir()
            build(made)
            try:
                made.rename(entry)
            except OSError:
                if not entry.is_dir():
                    raise
    return [entry / name for name in names]
