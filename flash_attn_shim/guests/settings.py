"""What a user says about programs: which do not see us, and whether their code is read at all."""

from __future__ import annotations

import os

from flash_attn_shim import policy


def decides() -> bool:
    """May the code of a program decide what it gets? Not under `MTLFLASHATTN_FLAGS=off`."""
    return os.environ.get(policy.FLAGS, "").strip().lower() not in policy.OFF


def hides_from(module: str) -> str | None:
    """The item of `MTLFLASHATTN_HIDE` that names the module or a package that it lies in, None if there is none.

    A custom node of ComfyUI is named after the path that it was loaded from: its last part counts.
    """
    names = module, module.rpartition("/")[2]
    for item in os.environ.get(policy.HIDE, "").split(","):
        item = item.strip()
        if item and any(name == item or name.startswith(f"{item}.") for name in names):
            return item
    return None
