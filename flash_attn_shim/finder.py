"""Finds presented modules: maps a top-level name to its file in `presents/`, unless a real installation has it.

Submodules are not handled here: a presented package has an ordinary `__path__`, so adding a file adds a module.
"""

from __future__ import annotations

import os
import sys
from _frozen_importlib_external import PathFinder
from _thread import _local

from flash_attn_shim import policy
from flash_attn_shim.autoload import PRESENTED, gate

TYPE_CHECKING = False  # typing itself is not imported here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PRESENTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "presents")

_SOURCE_OR_EXTENSION = (".py", ".pyc", ".so", ".pyd")

# A finder that we ask may look the name up again, and so end up here in the same thread.
_asking = _local()

_warned: set[str] = set()


def environment() -> policy.Environment:
    """The `policy.Environment` of this process. Tests replace this function to run as on another machine."""
    uname = getattr(os, "uname", None)  # Windows has none
    return policy.Environment(os.environ, sys.platform, uname().machine if uname else "unknown", is_installed)


def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The gate's `find_spec` for one of its names."""
    if fullname in _names_being_asked() or fullname.startswith("flash_attn_shim."):  # a user's flag can be named so
        return None
    if fullname not in PRESENTED:
        from flash_attn_shim import adjust

        return adjust.find_spec(fullname, path, target)
    env = environment()
    _warn_once_about_switch(env)
    if policy.refusal(fullname, env):
        return None
    from flash_attn_shim import guests

    if guests.why_hidden(fullname, guests.asking()):
        return None
    found = find_elsewhere(fullname, path, target)
    if found is None:
        found = presented_spec(fullname)
        _warn_of_early_libraries()
    elif found.origin is None and not found.submodule_search_locations:
        _warn_once(
            f"{fullname} comes from the import hook {_hook(found)} ({_file_of_hook(found)}), which is not this "
            "project's. `mtlflashattn doctor` says more."
        )
    return found


def presented_spec(name: str) -> ModuleSpec | None:
    """The spec of our own file for a top-level name: a real one, from the ordinary path finder."""
    return PathFinder.find_spec(name, [PRESENTS])


def find_elsewhere(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
    """The spec of a real installation of the name, found by the other finders on `sys.meta_path`, or None.

    A namespace package without modules in it is what an uninstall leaves (pip keeps directories with foreign files)
    and does not count. Asks the finders directly: `importlib.util.find_spec` takes import locks
    (DataDog/dd-trace-py#17742).
    """
    names = _names_being_asked()
    names.add(name)
    namespace = None
    try:
        for finder in list(sys.meta_path):
            find = None if finder is gate else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None  # finders without it exist: googlecolab/colabtools#5000
            if spec is None:
                continue
            if spec.loader is not None and "NamespaceLoader" not in type(spec.loader).__name__:
                return spec
            namespace = namespace or spec
    finally:
        names.discard(name)
    return namespace if namespace is not None and _holds_modules(namespace.submodule_search_locations) else None


def is_installed(name: str) -> bool:
    """Is there a real module of that name, imported or not? Does not import it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return find_elsewhere(name) is not None


def locate(name: str) -> tuple[bool, str | None, str]:
    """What `import name` gives right now, without importing: (is it ours?, file or None, why, in words)."""
    if name in sys.modules:
        module = sys.modules[name]
        if module is None:
            return False, None, f'sys.modules["{name}"] is None: something blocks the import'
        if is_ours(module):
            return _ours_while_switched_on(name, module)
        return False, getattr(module, "__file__", None), "another module of that name is already imported"
    real = find_elsewhere(name)
    if real is not None:
        file = real.origin or next(iter(real.submodule_search_locations or ()), None)
        if file is None:
            return False, _file_of_hook(real), f"the import hook {_hook(real)} presents it, which is not this project's"
        return False, file, "a real installation has it"
    refused = policy.refusal(name, environment())
    if refused:
        return False, None, refused
    if gate not in sys.meta_path:
        return False, None, "the import hook is not set: flash_attn_shim.install() sets it"
    spec = presented_spec(name)
    return True, spec.origin if spec else None, "presented by the shim"


def is_ours(module: object) -> bool:
    """Was this module loaded from `presents/`?"""
    origin = getattr(getattr(module, "__dict__", {}).get("__spec__"), "origin", None)
    return isinstance(origin, str) and origin.startswith(PRESENTS + os.sep)


def forget() -> None:
    """Drop presented modules from `sys.modules`."""
    for name, module in list(sys.modules.items()):
        if is_ours(module):
            del sys.modules[name]


def _ours_while_switched_on(name, module):
    refused = policy.refusal(name, environment())
    if refused:
        return False, module.__file__, f"imported from the shim earlier, but {refused}"
    return True, module.__file__, "presented by the shim, already imported"


def _names_being_asked():
    try:
        return _asking.names
    except AttributeError:
        _asking.names = set()
        return _asking.names


def _holds_modules(directories):
    for directory in directories:
        for entry in os.scandir(directory) if os.path.isdir(directory) else ():
            if entry.name.endswith(_SOURCE_OR_EXTENSION) or os.path.isfile(os.path.join(entry.path, "__init__.py")):
                return True
    return False


def _hook(spec):
    """The class that loads a module which no file belongs to: another project's import hook."""
    return f"{type(spec.loader).__module__}.{type(spec.loader).__qualname__}"


def _file_of_hook(spec):
    return getattr(sys.modules.get(type(spec.loader).__module__), "__file__", None)


def _warn_once_about_switch(env):
    value = policy.unknown_mode(env)
    if value is not None:
        _warn_once(f"{policy.SWITCH}={value} is not a known value and counts as auto. Known: off, auto, on.")


def _warn_once(text):
    if text not in _warned:
        _warned.add(text)
        warn(text)


def _warn_of_early_libraries():
    if "transformers" in sys.modules or "diffusers" in sys.modules:
        from flash_attn_shim.adjust import late

        late.warn_of_libraries()


def warn(text: str) -> None:
    """A UserWarning that can be filtered but never raises: no import may fail because of it."""
    import warnings

    try:
        warnings.warn(text, stacklevel=3)
    except UserWarning as error:  # -W error
        print(f"warning: {error}", file=sys.stderr)
