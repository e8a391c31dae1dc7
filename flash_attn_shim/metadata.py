"""The distribution record that `importlib.metadata` sees: a virtual `flash-attn`, never a directory on disk.

A `flash-attn` .dist-info on disk would make pip and uv believe that the real package is installed. transformers and
others ask `importlib.metadata` before they use a module that they found, so the record is announced exactly while
`flash_attn` may be seen, and only together with the adjustment of transformers: with metadata alone, transformers
4.57 breaks ModernBERT's default attention.
"""

from __future__ import annotations

import os
from importlib.metadata import Distribution
from pathlib import Path

from flash_attn_shim import adjust, finder, guests, policy
from flash_attn_shim.adjust import transformers
from flash_attn_shim.autoload import PRESENTED

NAME = "flash-attn"

_METADATA = f"""\
Metadata-Version: 2.1
Name: {NAME}
Version: {policy.FLASH_ATTN_VERSION}
Summary: The FlashAttention 2 interface, presented by mtlflashattn; nothing is installed under this name
"""


class PresentedDistribution(Distribution):
    """`flash-attn` as far as a reader of metadata can tell; its files are the presented ones."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return _METADATA
        if filename == "top_level.txt":
            return "".join(f"{name}\n" for name in self._names)
        if filename == "RECORD":
            return "".join(f"{path.relative_to(finder.PRESENTS).as_posix()},,\n" for path in self._paths())
        return None

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(finder.PRESENTS, path)

    def _paths(self):
        for name in self._names:
            module = Path(finder.PRESENTS, name)
            yield from sorted(module.rglob("*.py")) if module.is_dir() else [module.with_suffix(".py")]


def find_distributions(name: str | None) -> tuple[Distribution, ...]:
    """The virtual distribution if `name` (None: any) asks for it and it is announced now."""
    if name is not None and name.lower().replace("_", "-").replace(".", "-") != NAME:
        return ()
    if refusal() or guests.why_hidden("flash_attn", guests.asking()):
        return ()
    # Both names belong to the record: transformers 5.4 to 5.8 index packages_distributions() with either once its
    # spec is found.
    return (PresentedDistribution([name for name in PRESENTED if finder.locate(name)[0]]),)


def refusal() -> str | None:
    """Why the record is not announced right now, in words; None if it is."""
    # The record is that of the module that is presented, also beside metadata that another version left behind.
    return transformers.refusal() or adjust.transformers_left_alone()
