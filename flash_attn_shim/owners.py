"""Other projects under our names: a distribution `mtlflashattn`, and a package `flash_attn_mps`.

PyPI has a distribution `mtlflashattn` by another author, which installs `metal_flash_attn` and an import hook of its
own, and SuperMarioYL/flash-attn-mps installs a package `flash_attn_mps`. Two distributions can even write into one
directory `flash_attn_mps`: pip lets them, and the last one wins. Nothing here runs when Python starts or when a name is
looked up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

DISTRIBUTION = "mtlflashattn"
PACKAGE = "flash_attn_mps"

_INIT = f"{PACKAGE}/__init__.py"
_MARK = f'__distribution__ = "{DISTRIBUTION}"'  # a line of our flash_attn_mps/__init__.py


def distributions() -> list[tuple[metadata.Distribution, bool]]:
    """The installed distributions named `mtlflashattn`, in the order of `sys.path`: (the distribution, is it ours?)."""
    return [(found, _is_ours(found)) for found in metadata.distributions(name=DISTRIBUTION)]


def our_distribution() -> metadata.Distribution | None:
    """Our own distribution, None if it is not installed (a checkout on PYTHONPATH, a zipapp)."""
    return next((found for found, ours in distributions() if ours), None)


def foreign_package() -> str | None:
    """Why `import flash_attn_mps` does not give our package, and what to do, in words; None if it does.

    Does not import it: another project's may need what is not there, or take long.
    """
    module = sys.modules.get(PACKAGE)
    spec = module.__spec__ if module is not None else util.find_spec(PACKAGE)
    if spec is None or _is_our_package(spec):
        return None
    here = spec.origin or next(iter(spec.submodule_search_locations or ()), "an import hook")
    owners = [found for found in claims() if not _is_ours(found)]
    whose = " and ".join(f"{found.name} {found.version}" for found in owners) or "another project"
    remedy = f"pip uninstall {owners[0].name}" if owners else f"remove {here}, or put {_home()} first on sys.path"
    if os.path.realpath(here) == os.path.join(_home(), *_INIT.split("/")):
        return f"{here} was overwritten by {whose}: {remedy}, and install {DISTRIBUTION} again"
    return f"`import {PACKAGE}` finds {here}, which belongs to {whose}, not to {DISTRIBUTION}: {remedy}"


def claims() -> list[metadata.Distribution]:
    """The installed distributions that say that they installed `flash_attn_mps/__init__.py`."""
    return [found for found in metadata.distributions() if _records(found, _INIT)]


def findings() -> dict[str, Any]:
    """Name -> lines of text: who owns our names here."""
    owned = [f"{'this project' if ours else 'ANOTHER PROJECT'}: {_describe(d)}" for d, ours in distributions()]
    foreign = foreign_package()
    spec = None if foreign else util.find_spec(PACKAGE)
    found = f"ANOTHER PROJECT: {foreign}" if foreign else f"this project: {spec.origin}" if spec else "not found"
    also = [f"also installed by another project: {_describe(d)}" for d in claims() if not _is_ours(d)]
    return {
        f"distribution {DISTRIBUTION}": owned or "not installed: this is a checkout, or a copy on sys.path",
        f"package {PACKAGE}": [found, *(() if foreign else also)],
    }


def advice() -> Iterator[str]:
    """What to do about other projects under our names, a sentence for each."""
    for found, ours in distributions():
        if not ours:
            yield (
                f"{DISTRIBUTION} {found.version} in {found.locate_file('')} is another project of the same name "
                f"(PyPI has one). If you meant this one: pip uninstall {DISTRIBUTION}, then install this project from "
                "its checkout or wheel. Do not keep both in one environment: each sets an import hook for flash_attn."
            )
    foreign = foreign_package()
    if foreign:
        yield f"{foreign}."
        return
    for found in claims():
        if not _is_ours(found):
            yield (
                f"{found.name} {found.version} installs a package {PACKAGE} too, in {found.locate_file(PACKAGE)}. "
                f"Programs get whichever comes first. If you want this project's: pip uninstall {found.name}, then "
                f"install {DISTRIBUTION} again."
            )


def _is_ours(found):
    return any(entry.value.startswith("flash_attn_shim.") for entry in found.entry_points)


def _is_our_package(spec):
    get_source = getattr(spec.loader, "get_source", None)
    if get_source is None or spec.origin is None:
        return False
    source = get_source(spec.name)
    return source is None or _MARK in source  # None: compiled files alone, as in a frozen program


def _records(found, path):
    return any(line.startswith(f"{path},") for line in (found.read_text("RECORD") or "").splitlines())


def _describe(found):
    recorded = (line.partition(",")[0] for line in (found.read_text("RECORD") or "").splitlines())
    tops = {path.split("/")[0] for path in recorded if not path.startswith(("..", "_"))}
    packages = sorted(top for top in tops if top and not top.endswith((".dist-info", ".pth", ".start", "-stubs")))
    held = f", with {', '.join(packages)}" if packages else ""
    return f"{found.name} {found.version} in {found.locate_file('')}{held}"


def _home():
    """The directory that our packages lie in."""
    return os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
