"""Installations of flash_attn that hide this project and are of no use, as `mtlflashattn doctor` finds them.

An empty folder made to get past "requires flash_attn", fake-flash-attention from PyPI, a checkout of Dao-AILab's
repository without its compiled extension, metadata that an uninstalled version left behind. Nothing is imported.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from importlib import metadata, util

from flash_attn_shim import finder, policy
from flash_attn_shim.autoload import PRESENTED

_DISTRIBUTIONS = {"flash_attn": ("flash-attn", "flash-attn-4"), "flash_attn_interface": ("flash-attn-3",)}
_EXTENSIONS = {"flash_attn": ("flash_attn_2_cuda", "aiter"), "flash_attn_interface": ("flash_attn_3",)}
_NEEDED = "flash_attn_func"


def fault(name: str) -> str | None:
    """What is wrong with the installation that `import name` would find, in words; None if nothing is seen."""
    file = _file(name)
    if file is None:
        return None
    texts = _texts(name, file)
    if not any(_NEEDED in _names(text) for text in texts):
        return f"it lacks {_NEEDED}"
    extensions = [x for x in _EXTENSIONS[name] if any(_imports(text, x) for text in texts)]
    if extensions and not any(util.find_spec(x) for x in extensions):
        return f"it cannot be imported: its extension {extensions[0]} is not there (a checkout, or a failed build)"
    owners = [found for found in _owners(name) if _normal(found.name) not in _DISTRIBUTIONS[name]]
    if owners:
        return f"it belongs to {owners[0].name} {owners[0].version}, which is not FlashAttention"
    return None


def advice() -> Iterator[str]:
    """What to do about each, a sentence or two."""
    for name in PRESENTED:
        why = fault(name)
        if why is not None:
            yield f"{_file(name)} hides this project's {name}, and {why}. Remove it: {_removal(name)}"
    seen, _, _ = finder.locate("flash_attn")
    for found in metadata.distributions(name="flash-attn") if seen else ():
        if found.version != policy.FLASH_ATTN_VERSION or found.read_text("RECORD") is None:
            where = getattr(found, "_path", found.locate_file(""))
            yield (
                f"flash-attn {found.version} has metadata ({where}) and no module; this project announces "
                f"{policy.FLASH_ATTN_VERSION}, that of the module it presents. To remove what was left: pip uninstall "
                f"flash-attn, or delete {where}"
            )


def _file(name):
    """The file, or the directory, of another project's module of that name, without importing it."""
    module = sys.modules.get(name)
    if module is not None:
        return None if finder.is_ours(module) else getattr(module, "__file__", None)
    spec = finder.find_elsewhere(name)
    return None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _texts(name, file):
    """The sources that say what it has."""
    home = file if os.path.isdir(file) else os.path.dirname(file)
    beside = os.path.join(home, "flash_attn_interface.py") if name == "flash_attn" else file
    texts = []
    for path in dict.fromkeys((file, beside)):
        if path.endswith(".py") and os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as source:
                texts.append(source.read())
    return texts


def _names(text):
    """The names that a source defines or imports."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return set()
    functions = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    imported = {a.asname or a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
    assigned = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return functions | imported | assigned


def _imports(text, module):
    return f"import {module}" in text or f"from {module}" in text


def _owners(name):
    files = (f"{name}/__init__.py,", f"{name}.py,")
    for found in metadata.distributions():
        if any(line.startswith(files) for line in (found.read_text("RECORD") or "").splitlines()):
            yield found


def _removal(name):
    owner = next(_owners(name), None)
    if owner is not None:
        return f"pip uninstall {owner.name}"
    file = _file(name)
    home = os.path.dirname(file) if os.path.basename(file) == "__init__.py" else file
    here = os.path.dirname(os.path.abspath(home)) == os.getcwd()
    return f"delete {home}" + (", or run in another directory" if here else "")


def _normal(name):
    return name.lower().replace("_", "-").replace(".", "-")
