"""diffusers needs no adjustment if it is imported after the hook is set; this file fixes one that was imported before.

Tested with 0.38.0 and 0.42.1. When it is imported, diffusers asks once for the module and its metadata, caches the
answer in `diffusers.utils.import_utils`, and takes the functions of the backends "flash" and "flash_varlen" in
`diffusers.models.attention_dispatch`. FlashAttention 3 stays unavailable: it asks for another distribution.
"""

from __future__ import annotations

import sys
from importlib import import_module

from flash_attn_shim import policy
from flash_attn_shim.adjust.changes import Misfit, Undo

UTILS = "diffusers.utils.import_utils"
DISPATCH = "diffusers.models.attention_dispatch"

_FUNCTIONS = {
    "flash_attn_func": "flash_attn",
    "flash_attn_varlen_func": "flash_attn",
    "_wrapped_flash_attn_forward": "flash_attn.flash_attn_interface",
    "_wrapped_flash_attn_backward": "flash_attn.flash_attn_interface",
}


def catch_up(undo: Undo) -> None:
    """Give an imported diffusers the answers that it would get now. `Misfit` if it keeps them elsewhere."""
    utils, dispatch = sys.modules.get(UTILS), sys.modules.get(DISPATCH)
    if utils is None or vars(utils).get("_flash_attn_available") is True:
        return
    for module, names in (
        (utils, ("_flash_attn_available", "_flash_attn_version")),
        (dispatch, ("_CAN_USE_FLASH_ATTN", *_FUNCTIONS)),
    ):
        missing = [] if module is None else [name for name in names if name not in vars(module)]
        if module is not None and missing:
            raise Misfit(f"{module.__name__} has no {', '.join(missing)}")
    undo.set(utils, "_flash_attn_available", True)
    undo.set(utils, "_flash_attn_version", policy.FLASH_ATTN_VERSION)
    if dispatch is not None:
        undo.set(dispatch, "_CAN_USE_FLASH_ATTN", True)
        for name, source in _FUNCTIONS.items():
            undo.set(dispatch, name, getattr(import_module(source), name))
    clear = getattr(vars(utils).get("is_flash_attn_version"), "cache_clear", None)  # cached in some versions
    if clear is not None:
        clear()
