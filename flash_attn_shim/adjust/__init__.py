"""Changes to other libraries right after they are executed: one file a library, with the reason and the versions it
was tried with.

An adjustment that does not fit the library's version leaves it untouched and says why in `changes.journal`. Each file
has `MODULES`: module name -> function that takes the executed module and changes it through an `Undo`, or raises
`Misfit` before it has changed anything; `refusal()`, why the library is left alone; and `catch_up(undo)`, for what else
a late install must mend. `programs.py` does the same for flags that the
user lists. What programs get for what their code shows is the subject of `flash_attn_shim.guests`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

from flash_attn_shim import finder
from flash_attn_shim.adjust.changes import APPLIED, PENDING, Misfit, Undo, journal
from flash_attn_shim.autoload import ADJUSTED

_undo = Undo()


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The other finders' spec of a module, with a loader that calls the adjustment after executing the module."""
    spec = finder.find_elsewhere(name, path, target)
    if spec is None or spec.loader is None or not _adjusts(name):
        return spec
    loader, execute = spec.loader, spec.loader.exec_module

    def exec_module(module):
        del loader.exec_module  # the loader is as it was, whatever happens next
        journal[name] = PENDING
        try:
            execute(module)
        except BaseException:
            del journal[name]
            raise
        _adjust(name, module)

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader, until it has run
    except AttributeError:
        journal[name] = f"left alone: {type(loader).__name__} does not let its exec_module be wrapped"
    return spec


def catch_up() -> None:
    """Adjust libraries that were imported while the hook was not set, or was switched off."""
    missed = [name for name in ADJUSTED if sys.modules.get(name) is not None and journal.get(name) != APPLIED]
    for name in missed:
        if not _library(name).refusal():
            _adjust(name, sys.modules[name])
    for library in {_library(name) for name in missed}:
        if not library.refusal():
            library.catch_up(_undo)
    _programs().catch_up(_undo)
    late = import_module("flash_attn_shim.adjust.late")
    late.warn(late.mend(_undo))


def children() -> None:
    """Have the processes that multiprocessing spawns call `install()` too."""
    import_module("flash_attn_shim.adjust.children").adjust(_undo)


def undo() -> None:
    """Undo every adjustment."""
    _undo.run()
    journal.clear()


def transformers_left_alone() -> str | None:
    """Why the transformers that is imported is not adjusted, in words; None if it is, or if none is imported."""
    probe = "transformers.utils.import_utils"
    if sys.modules.get(probe) is None:
        return None
    state = journal.get(
        probe, "transformers was imported before the hook was active; flash_attn_shim.install() adjusts it"
    )
    return None if state in (PENDING, APPLIED) else state


def _library(name):
    return import_module(f"flash_attn_shim.adjust.{ADJUSTED[name]}")


def _programs():
    return import_module("flash_attn_shim.adjust.programs")


def _adjusts(name):
    if name in ADJUSTED:
        return not _library(name).refusal() or _library(name).hides()
    return not _programs().refusal() and _programs().knows(name)


def _adjust(name, module):
    adjustment = _library(name).MODULES[name] if name in ADJUSTED else _programs().adjust
    try:
        journal[name] = adjustment(module, _undo) or APPLIED
    except Misfit as reason:
        journal[name] = f"left alone: {reason}"
