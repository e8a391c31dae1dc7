"""Applies the flags of `MTLFLASHATTN_FLAGS` to a program's module once it is executed.

    MTLFLASHATTN_FLAGS=module:FLAG=value,...

`value` is True, False, None, an integer, or a string, in quotes or without. `MTLFLASHATTN_FLAGS=off` leaves all
programs alone, also those whose code would decide what they get (`flash_attn_shim.guests`).
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from flash_attn_shim import finder, policy
from flash_attn_shim.adjust.changes import Misfit, Undo, journal
from flash_attn_shim.autoload import PRESENTED

_VALUES = {"True": True, "False": False, "None": None}
_EXPECTED = (
    "Expected module:FLAG=value, with True, False, None, an integer or a string, for example "
    "package.attention:HAS_FLASH_ATTN=False; separate items with commas."
)

_warned: set[str] = set()


class Flag:
    """`name` in the modules whose dotted name ends in `module` becomes `value` while the shim presents something."""

    def __init__(self, module: str, name: str, value: object) -> None:
        self.module = module
        self.name = name
        self.value = value

    def matches(self, fullname: str) -> bool:
        return fullname == self.module or fullname.endswith("." + self.module)


def refusal() -> str | None:
    """Why programs are left alone right now, in words; None if their flags are set."""
    value = os.environ.get(policy.FLAGS, "")
    if value.strip().lower() in policy.OFF:
        return f"{policy.FLAGS}={value} leaves programs alone"
    return policy.refusal_here(finder.environment())


def flags() -> list[Flag]:
    """What the variable lists. Items that cannot be read are ignored, with one warning."""
    value = os.environ.get(policy.FLAGS, "")
    if value.strip().lower() in policy.OFF:
        return []
    listed = []
    for item in filter(str.strip, value.split(",")):
        left, _, text = item.strip().partition("=")
        module, _, name = left.rpartition(":")
        if module.strip() and name.strip().isidentifier() and text.strip():
            listed.append(Flag(module.strip(), name.strip(), _parsed(text.strip())))
        else:
            _warn_once(f'{policy.FLAGS}: ignoring "{item.strip()}". {_EXPECTED}')
    return listed


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
    done = [f"{flag.name} is set to {flag.value!r}: {policy.FLAGS} asks for it" for flag in ours if not reasons[flag]]
    if not done:
        raise Misfit("; ".join(f"{flag.name} {why}" for flag, why in reasons.items()))
    return "; ".join(done)


def catch_up(undo: Undo) -> None:
    """Set the flags of modules that were imported while the shim was not there."""
    known = [] if refusal() else flags()
    for name, module in list(sys.modules.items()):
        if module is not None and name not in journal and any(flag.matches(name) for flag in known):
            try:
                journal[name] = adjust(module, undo)
            except Misfit as reason:
                journal[name] = f"left alone: {reason}"


def _why_not(flag, module):
    """Why the flag is not set in that module, in words that follow its name; None if it is."""
    if not any(finder.locate(name)[0] for name in PRESENTED):
        return f"is kept: the shim does not present {' or '.join(PRESENTED)}"
    if flag.name not in vars(module):
        return "does not exist"
    current = vars(module)[flag.name]
    if current == flag.value and type(current) is type(flag.value):
        return f"is already {current!r}"
    if None not in (flag.value, current) and type(current) is not type(flag.value):
        why = f"is {type(current).__name__}, not {type(flag.value).__name__}"
        _warn_once(f"{policy.FLAGS}: {flag.name} of {module.__name__} {why}: it is not set to {flag.value!r}.")
        return why
    return None


def _parsed(text):
    if text in _VALUES:
        return _VALUES[text]
    if text.removeprefix("-").isdecimal():
        return int(text)
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] in ("'", '"') else text


def _warn_once(text):
    if text not in _warned:
        _warned.add(text)
        finder.warn(text)
