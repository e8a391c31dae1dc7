"""What `mtlflashattn tune` found, in a file of the user's cache directory.

One small JSON file: the machine it holds for (GPU, torch, a digest of the kernel sources), the fastest variant of each
`Key`, and, in a section of its own, what `flash_attn_mps.sdpa` measured. A file that cannot be read, or that holds for
another machine, another torch or other kernels, counts as none, with one warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...problem import AttentionProblem
from . import gpu, specialization
from .kernel import LENGTHS, Choice

CACHE = "MTLFLASHATTN_CACHE"
_FORMAT = 2
_WINNERS = "winners"  # the section of the variants
MASKS = ("full", "causal", "window")


class Key(NamedTuple):
    """What decides which variant is fastest: a kernel and a class of its calls."""

    kernel: str  # its name
    dtype: str  # torch's name, without "torch."
    head_dim: int
    head_dim_v: int
    length: str  # of LENGTHS
    mask: str  # of MASKS

    def __str__(self) -> str:
        dims = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        return f"{self.kernel} {self.dtype} {dims} {self.length} {self.mask}"


def key_of(p: AttentionProblem, kernel: Choice) -> Key:
    mask = "window" if p.window_left >= 0 else "causal" if p.window_right >= 0 else "full"
    dtype = str(p.q.dtype).removeprefix("torch.")
    return Key(kernel.name, dtype, p.q.shape[-1], p.v.shape[-1], kernel.class_of(p), mask)


class Winner(NamedTuple):
    variant: str  # its name
    seconds: float  # of one call
    default_seconds: float  # of the variant that it is better than


def directory() -> Path:
    """`MTLFLASHATTN_CACHE`, or the platform's cache directory."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mtlflashattn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtlflashattn"


def path() -> Path:
    return directory() / "variants.json"


def machine() -> dict[str, str]:
    """What winners hold for."""
    return {"gpu": gpu.name(), "torch": torch.__version__, "kernels": _digest()}


def read() -> dict[str, Any]:
    """The sections of the file that hold for this machine; none, with a warning, from one that does not."""
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(file, f"it cannot be read ({error})")
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            return _ignored(file, f"it has format {data['format']!r}, and this version reads {_FORMAT}")
        for what, here in machine().items():
            if data["machine"][what] != here:
                there = data["machine"][what]
                return _ignored(file, f"it was made with {what} {there!r}, not {here!r}; run `mtlflashattn tune` again")
        return data
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return broken(error)


def write(section: str, entries: list[dict]) -> Path:
    """Put `entries` in the place of that section, replacing the file in one step. Raises OSError."""
    file = path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be used is replaced
        data = {**read(), "format": _FORMAT, "machine": machine(), section: entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=".variants-")
    try:
        with open(descriptor, "w", encoding="utf-8") as out:
            json.dump(data, out, indent=1)
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise
    return file


def load() -> dict[Key, Winner]:
    """The stored winners of this machine; none, with a warning, from a file that does not hold for it."""
    try:
        return {_key(entry): _winner(entry) for entry in read().get(_WINNERS, ())}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return broken(error)


def save(winners: dict[Key, Winner]) -> Path:
    """Add `winners` to those stored for this machine. Raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be used is replaced
        merged = {**load(), **winners}
    return write(_WINNERS, [{**key._asdict(), **winner._asdict()} for key, winner in sorted(merged.items())])


def _key(entry: dict) -> Key:
    key = Key(*(entry[field] for field in Key._fields))
    if not (isinstance(key.head_dim, int) and isinstance(key.head_dim_v, int)):
        raise ValueError(f"head dims {key.head_dim!r} and {key.head_dim_v!r}")
    if key.length not in LENGTHS or key.mask not in MASKS:
        raise ValueError(f"length {key.length!r}, mask {key.mask!r}")
    return key


def _winner(entry: dict) -> Winner:
    if not isinstance(entry["variant"], str):
        raise ValueError(f"variant {entry['variant']!r}")
    return Winner(entry["variant"], float(entry["seconds"]), float(entry["default_seconds"]))


def broken(error: Exception) -> dict:
    """Nothing, with a warning, for a section whose entries raised `error`."""
    return _ignored(path(), f"it is broken ({type(error).__name__}: {error})")


def _ignored(file: Path, reason: str) -> dict:
    warnings.warn(f"mtlflashattn: ignoring {file}: {reason}.", RuntimeWarning, stacklevel=4)
    return {}


def _digest() -> str:
    """A digest of the kernel sources: what was fastest for other sources says nothing about these."""
    digest = hashlib.sha256()
    for name, text in specialization.sources():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]
