"""Programs that ask for flash_attn: what their code shows, and what they get for it.

A *guest* is the module whose code asks: the frame that the finder, or a presented module, is asked from. Nothing is
known about modules that do not ask, and nothing is done to them. docs/cuda-insisting-programs.md has the design.

`presence.py` and `cuda.py`: who does not see us. `results.py` and `dialects.py`: results in an older shape.
`fa1.py`: names of FlashAttention 1. `again.py`: guests that ask when flash_attn has been imported already.
"""

from __future__ import annotations

import sys
import types

from flash_attn_shim import policy
from flash_attn_shim.autoload import PRESENTED
from flash_attn_shim.guests import journal, settings

#: Modules that ask on behalf of others. importlib's own have the second names until somebody imports `importlib`.
_BETWEEN = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "importlib_metadata", "pkgutil")

_decided: dict[tuple[str, str], dict[str, str]] = {}


def asking(frame: types.FrameType | None = None) -> types.FrameType | None:
    """The frame that asks for a module of ours, from `frame` (None: the caller) on; None if it is in such a module."""
    frame = frame or sys._getframe(1)
    while frame is not None and _top(frame) in (*_BETWEEN, "flash_attn_shim"):
        frame = frame.f_back
    return None if frame is None or _top(frame) in PRESENTED else frame


def why_hidden(name: str, frame: types.FrameType | None) -> str | None:
    """Why the presented module `name` does not exist for the code of that frame, in words; None if it does."""
    if frame is None:
        return None
    module, file = str(frame.f_globals.get("__name__")), frame.f_code.co_filename
    item = settings.hides_from(module)
    if item:
        reasons = dict.fromkeys(PRESENTED, f"{policy.HIDE} names {item}")
    elif settings.decides():
        if (module, file) not in _decided:
            _decided[module, file] = _reasons(module, file, frame.f_globals)
        reasons = _decided[module, file]
    else:
        reasons = {}
    if reasons:
        journal.hidden[module] = reasons
    return reasons.get(name)


def _reasons(module, file, namespace):
    if file.startswith("<"):  # code without a file that could be read
        return {}
    from flash_attn_shim.guests import presence  # which needs the parser: a file has to be read, so it is worth it

    try:
        return presence.reasons(module, file, namespace)
    except Exception as error:  # a mistake in reading a program must not break it
        journal.failures[module] = repr(error)
        return {}


def _top(frame):
    return str(frame.f_globals.get("__name__")).partition(".")[0]
