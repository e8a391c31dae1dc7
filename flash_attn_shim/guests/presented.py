"""The class of presented modules, which notice who imports them when they are imported already.

Python asks no finder then, but it reads `__spec__` of the module, as does `importlib.util.find_spec`. From Python 3.13
on an error there makes the import fail (before, `import flash_attn` ignores it, and `again.py` mends what followed).
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.machinery import ModuleSpec

from flash_attn_shim import guests


class Presented(types.ModuleType):
    """A module that is there for everybody but the guests that must not see it."""

    @property
    def __spec__(self) -> ModuleSpec | None:
        spec = vars(self)["__spec__"]
        frame = guests.asking()
        name = self.__name__.partition(".")[0]
        why = guests.why_hidden(name, frame)
        if why is not None:
            from flash_attn_shim.guests import again

            is_lookup = sys._getframe(1).f_globals.get("__name__") == "importlib.util"  # it cannot say "not found" now
            if is_lookup or sys.version_info < (3, 13):
                again.after_import(frame)
            if not is_lookup:
                raise ModuleNotFoundError(f"No module named {name!r} (mtlflashattn hides it: {why})", name=name)
        return spec

    @__spec__.setter
    def __spec__(self, spec: ModuleSpec | None) -> None:
        vars(self)["__spec__"] = spec

    def __reduce__(self) -> tuple[object, ...]:  # as cloudpickle does for ordinary modules
        return importlib.import_module, (self.__name__,)


def present(name: str) -> None:
    """Make the module that is being imported under that name a `Presented` one."""
    sys.modules[name].__class__ = Presented
