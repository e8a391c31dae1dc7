"""Applies the flags of `flags.TABLE`, and those of `MTLFLASHATTN_FLAGS`, to a program's module once it is executed.

    MTLFLASHATTN_FLAGS=module:FLAG=value,...

adds flags, or replaces those of the table for the same module and flag; `value` is True, False, None or an integer.
`MTLFLASHATTN_FLAGS=off` leaves all programs alone.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from flash_attn_shim import finder, policy
from flash_attn_shim.adjust.changes import Misfit, Undo, journal
from flash_attn_shim.adjust.flags import FA2, FA3, TABLE, Flag

_VALUES = {"True": True, "False": False, "None": None}

_warned: set[str] = set()


def refusal() -> str | None:
    """Why programs are left alone right now, in words; None if their flags are set."""
    value = os.environ.get(policy.FLAGS, "")
    if value.strip().lower() in policy.OFF:
        return f"{policy.FLAGS}={value} leaves programs alone"
    return policy.refusal_here(finder.environment())


def flags() -> list[Flag]:
    """The table, with the user's changes."""
    listed = _listed(os.environ.get(policy.FLAGS, ""))
    replaced = {(flag.module, flag.name) for flag in listed}
    return [*(flag for flag in TABLE if (flag.module, flag.name) not in replaced), *listed]


def knows(fullname: str) -> bool:
    """Is there a flag for a module of that name?"""
    return any(flag.matches(fullname) for flag in flags())


def adjust(module: ModuleType, undo: Undo) -> str:
    """Set the flags of an executed module; return what was set, as text. `Misfit` if nothing was."""
    ours = [flag for flag in flags() if flag.matches(module.__name__)]
    reasons = {flag: _why_not(flag, module) for flag in ours}
    for flag in ours:
        if reasons[flag] is None:
            undo.set(module, flag.name, flag.value)
    done = [f"{flag.name} is set to {flag.value}: {flag.reason}" for flag in ours if reasons[flag] is None]
    if not done:
        raise Misfit("; ".join(f"{flag.name} {why}" for flag, why in reasons.items()))
    return "; ".join(done)


def catch_up(undo: Undo) -> None:
    """Set the flags of modules that were imported while the shim was not there."""
    if refusal():
        return
    known = flags()
    for name, module in list(sys.modules.items()):
        if module is not None and name not in journal and any(flag.matches(name) for flag in known):
            try:
                journal[name] = adjust(module, undo)
            except Misfit as reason:
                journal[name] = f"left alone: {reason}"


def _why_not(flag, module):
    """Why the flag is not set in that module, in words that follow its name; None if it is."""
    served = (FA2, FA3) if flag.served is None else (flag.served,)
    if not any(finder.locate(name)[0] for name in served):
        return f"is kept: the shim does not present {' or '.join(served)}"
    if flag.name not in vars(module):
        return "does not exist"
    current = vars(module)[flag.name]
    if current is flag.value:
        return f"is already {current}"
    if flag.value is not None and type(current) is not type(flag.value):
        return f"is {type(current).__name__}, not {type(flag.value).__name__}"
    if flag.applies is not None and not flag.applies(module):
        return "is kept: it leads to no path that requires CUDA, or there is no other path"
    return None


def _listed(value):
    """The flags that the variable names. What cannot be read is ignored, with one warning."""
    if not value.strip() or value.strip().lower() in policy.OFF:
        return []
    listed = []
    for item in value.split(","):
        if not item.strip():
            continue
        left, _, text = item.strip().rpartition("=")
        module, _, name = left.rpartition(":")
        text = text.strip()
        known = text in _VALUES or text.removeprefix("-").isdecimal()
        if module.strip() and name.strip().isidentifier() and known:
            chosen = _VALUES[text] if text in _VALUES else int(text)
            reason = f"{policy.FLAGS} asks for it"
            listed.append(Flag(module.strip(), name.strip(), chosen, None, reason, policy.FLAGS, listed=True))
        else:
            _warn_once(item.strip())
    return listed


def _warn_once(item):
    if item in _warned:
        return
    _warned.add(item)
    finder.warn(
        f'{policy.FLAGS}: ignoring "{item}". Expected module:FLAG=value, with True, False, None or an integer, '
        "for example package.attention:HAS_FLASH_ATTN=False; separate items with commas."
    )
