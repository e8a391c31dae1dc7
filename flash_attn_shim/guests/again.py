"""A guest that must not see flash_attn, and asked for it when it had been imported already.

Its import statement has succeeded (Python asked nobody, see `presented.py`), so as soon as the guest has been executed,
the statements at its top that ask are run once more, this time without flash_attn: the same `try` takes its handler.
If the guest could not be executed because there is no CUDA, its importer gets the ImportError that it would have got.
"""

from __future__ import annotations

import ast
import sys
import types
from typing import Any

from flash_attn_shim import finder
from flash_attn_shim.autoload import PRESENTED
from flash_attn_shim.guests import journal
from flash_attn_shim.guests.presence import Module
from flash_attn_shim.guests.source import read

_ModuleSpec: Any = type(sys.__spec__)


class _Watched(_ModuleSpec):
    """The spec of a module that is being executed: importlib sets `_initializing` to False when it is done."""

    @property
    def _initializing(self):
        return self.__dict__["_initializing"]

    @_initializing.setter
    def _initializing(self, value):
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = _ModuleSpec
            error = sys.exc_info()[1]
            if error is None and self.name in sys.modules:
                _run_again(sys.modules[self.name])
            elif isinstance(error, AssertionError | RuntimeError) and "CUDA" in str(error):  # from torch
                why = next(iter(journal.hidden.get(self.name, {}).values()), "")
                raise ModuleNotFoundError(
                    f"No module named 'flash_attn' (mtlflashattn hides it: {why})", name="flash_attn"
                ) from error


def after_import(frame: types.FrameType | None) -> None:
    """Have the module of that frame ask again once it has been executed.

    Nothing can be done for what importlib does not execute: the script itself, and files that a program loads by hand.
    """
    spec = frame.f_globals.get("__spec__") if frame is not None else None
    if type(spec) is _ModuleSpec and vars(spec).get("_initializing"):
        spec.__class__ = _Watched


def _run_again(module):
    source = read(module.__file__, vars(module))
    statements = Module(source).asking_statements() if source else []
    code = compile(ast.Module(body=statements, type_ignores=[]), module.__file__, "exec")
    held = {name: value for name, value in sys.modules.items() if name.partition(".")[0] in PRESENTED}
    held = {name: value for name, value in held.items() if finder.is_ours(value)}
    for name in held:
        del sys.modules[name]
    try:
        exec(code, vars(module))  # the program's own statements, which have just been executed
    except Exception as error:
        journal.hidden[module.__name__] = {
            name: f"{why}; but asking again failed: {error!r}" for name, why in journal.hidden[module.__name__].items()
        }
    finally:
        sys.modules.update(held)
