"""`mtlflashattn doctor FILE`: what the code of a program decides, without running it."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator

from flash_attn_shim.guests import presence, shapes
from flash_attn_shim.guests.results import Result
from flash_attn_shim.guests.source import dotted, lines_of, read

_THREE = {name: "varlen" in name for name in shapes.WITH_EARLY_RESULTS}


def decisions(program: str) -> dict[str, list[str]]:
    """File -> what its code decides, for a file, the files of a directory, or an importable module or package.

    Files that do not mention flash_attn are left out; of the others it says so if nothing is decided.
    """
    found = {}
    for file in _files(program):
        if any("flash_attn" in line for line in lines_of(file)):
            found[file] = list(_of(file)) or ["nothing: it gets FlashAttention 2.8, and today's FlashAttention 3"]
    return found or {program: ["no file there mentions flash_attn"]}


def _files(program):
    if not os.path.exists(program):
        spec = importlib.util.find_spec(program)
        program = (spec.origin or next(iter(spec.submodule_search_locations or ()), "")) if spec else program
        program = os.path.dirname(program) if os.path.basename(program) == "__init__.py" else program
    if os.path.isfile(program):
        yield program
    for directory, _, names in os.walk(program):
        yield from sorted(os.path.join(directory, name) for name in names if name.endswith(".py"))


def _of(file) -> Iterator[str]:
    name = ".".join((*_package(os.path.dirname(os.path.abspath(file))), os.path.splitext(os.path.basename(file))[0]))
    reasons = presence.reasons(name.removesuffix(".__init__"), file, {})
    for why in dict.fromkeys(reasons.values()):
        yield f"does not see {' and '.join(name for name in reasons if reasons[name] == why)}: {why}"
    source = read(file)
    if source is None:
        return
    found: list[tuple[int, str]] = []
    taken: dict[str, list[tuple[str, str]]] = {}  # name in the file -> what of ours it may be
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (presence.FA2, presence.FA3):
            for alias in node.names:
                taken.setdefault(alias.asname or alias.name, []).append((node.module or "", alias.name))
                if alias.name in presence.OF_VERSION_1 and not source.is_guarded(node):
                    found.append((node.lineno, f"{alias.name} is there, since it is imported without another way"))
    for call in (n for n in source.nodes if isinstance(n, ast.Call)):
        module, _, name = dotted(call.func).rpartition(".")
        result = Result(source, call)
        for owner, function in [(module, name)] if module else taken.get(name, []):
            what: str | None = ""
            if owner == presence.FA3 and function in _THREE:
                what = shapes.early_result(_THREE[function], None, result)
            elif function == "unpad_input":
                what = shapes.four_values(result)
            if what:
                found.append((call.lineno, f"{function} {what}"))
    yield from (f"line {line}: {what}" for line, what in sorted(found))


def _package(directory):
    if not os.path.isfile(os.path.join(directory, "__init__.py")):
        return []
    return [*_package(os.path.dirname(directory)), os.path.basename(directory)]
