"""Are the files there that nothing imports by name? Tools that freeze programs leave such files out."""

from __future__ import annotations

import os
from importlib.util import find_spec

from flash_attn_shim import finder
from flash_attn_shim.autoload import PRESENTED

_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_KERNEL = os.path.join("flash_attn_mps", "tiers", "metal", "kernels", "forward.metal")


def check() -> None:
    """Raise ImportError, which names them, if presented modules or kernels are missing."""
    missing = [os.path.join(finder.PRESENTS, name) for name in PRESENTED if finder.presented_spec(name) is None]
    spec = find_spec("flash_attn_mps")
    if spec is None:
        missing.append("the package flash_attn_mps")
    elif os.path.join(_HOME, "flash_attn_mps") in (spec.submodule_search_locations or ()):  # and not another project's
        kernel = os.path.join(_HOME, _KERNEL)
        missing += [] if _is_readable(spec.loader, kernel) else [kernel]
    if missing:
        raise ImportError(
            f"flash_attn_shim.install(): files of mtlflashattn are missing: {', '.join(missing)}. If this is a frozen "
            "program: PyInstaller takes them along where mtlflashattn is installed, by its hook; other tools need to "
            "be told (the packages flash_attn_shim and flash_attn_mps with all their files)."
        )


def _is_readable(loader, path):
    if os.path.isfile(path):
        return True
    try:
        return bool(loader.get_data(path))  # a member of an archive
    except (AttributeError, OSError):
        return False
