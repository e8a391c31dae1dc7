"""pkg_resources (setuptools before 82): its working set has flash-attn where `importlib.metadata` announces it.

`pkg_resources.require("flash-attn>=2.0")` looks through directories, in which nothing of ours lies.
"""

from __future__ import annotations

from types import ModuleType

from flash_attn_shim import finder, policy
from flash_attn_shim.adjust.changes import Misfit, Undo

_KEY = "flash-attn"


def refusal() -> str | None:
    """Why it is left alone, in words; None if flash-attn is announced."""
    from flash_attn_shim import metadata

    return metadata.refusal()


def hides() -> bool:
    return False


def adjust(pkg_resources: ModuleType, undo: Undo) -> None:
    distribution = vars(pkg_resources).get("Distribution")
    by_key = getattr(vars(pkg_resources).get("working_set"), "by_key", None)
    if distribution is None or not isinstance(by_key, dict):
        raise Misfit(f"{pkg_resources.__name__} has no working_set.by_key")
    # Instead of metadata that an older version left behind, which are not those of the module.
    ours = distribution(location=finder.PRESENTS, project_name=_KEY, version=policy.FLASH_ATTN_VERSION)
    undo.set_item(by_key, _KEY, ours)


MODULES = {"pkg_resources": adjust}


def catch_up(undo: Undo) -> None:
    """Nothing else is cached."""
