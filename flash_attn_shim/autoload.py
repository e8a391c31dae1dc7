"""What `mtlflashattn.pth` and `mtlflashattn.start` call in every interpreter of the environment.

Imports only `sys` and `os`, which Python has loaded already: a start-up file that took 2 ms was too slow for others
(astral-sh/uv#20222). All work waits until one of the names below is looked up; so do the switch and the platform check,
because a program may set its environment first.

So the gate's imports stay inside its functions: `autoload` -> `finder` (a presented name) -> `adjust` (a library) ->
`adjust.transformers` and the rest. Moving them to the top of the modules would make a tidier drawing and break three
things: start-up would load more than two modules, a name looked up while `finder` itself is being imported would
re-enter a half-initialised module, and threads that import at the same time would wait for each other forever.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself is not imported here
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType

#: Top-level names that `flash_attn_shim/presents` holds.
PRESENTED = ("flash_attn", "flash_attn_interface")

#: Modules of other libraries that are changed once they are executed -> the file in `flash_attn_shim/adjust`.
ADJUSTED = {
    "pkg_resources": "pkg_resources",
    "transformers.utils.import_utils": "transformers",
    "transformers.integrations.flash_attention": "transformers",
    "transformers.modeling_flash_attention_utils": "transformers",
    "transformers.modeling_utils": "transformers",
}

_NAMES = frozenset((*PRESENTED, *ADJUSTED))

# `os.environ.get` encodes and decodes, which would take four fifths of the gate's time.
_environ = getattr(os.environ, "_data", os.environ)
_FLAGS = os.environ.encodekey("MTLFLASHATTN_FLAGS") if _environ is not os.environ else "MTLFLASHATTN_FLAGS"


class Gate:
    """The one object that stands in `sys.meta_path`: two look-ups, a quarter of a microsecond, for names that are not
    ours."""

    @staticmethod
    def find_spec(
        fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in _NAMES and (
            _FLAGS not in _environ or fullname.rpartition(".")[2] not in os.environ["MTLFLASHATTN_FLAGS"]
        ):
            return None
        try:
            from flash_attn_shim import finder
        except ImportError:  # uninstalled under a running interpreter: as if the gate were not there
            return None
        return finder.find_spec(fullname, path, target)

    @staticmethod
    def find_distributions(context: "DistributionFinder.Context") -> "Iterable[Distribution]":
        # pip and others ask with a path, for one directory at a time; nothing of ours lies in a directory of theirs.
        if "path" in vars(context) or (context.name is not None and context.name[:1] not in ("f", "F")):
            return ()
        try:
            from flash_attn_shim import metadata
        except ImportError:
            return ()
        return metadata.find_distributions(context.name)


gate = Gate()


def install() -> bool:
    """Put the gate in front of `sys.meta_path` once: a venv runs .pth lines twice (python/cpython#75723).
    Was it not there?

    In front, because an empty `flash_attn` directory that an uninstall left must not win; real installations still
    do, since the finder asks everybody else first.
    """
    if gate in sys.meta_path:
        return False
    sys.meta_path.insert(0, gate)
    return True


def uninstall() -> None:
    """Take the gate out of `sys.meta_path`."""
    if gate in sys.meta_path:
        sys.meta_path.remove(gate)
