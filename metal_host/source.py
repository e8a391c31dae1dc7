"""From the caller's string to one preprocessed text, line numbers kept.

`#include` works as in torch.mps.compile_shader: a header that exists below an include directory is pasted in, once;
every other one is left to the compiler, which finds Metal's own headers (include/).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from . import toolchain, versions
from .errors import refuse
from .tokens import Tokens

MAIN = "program_source"
_UNROLL_COUNT = re.compile(r"^([ \t]*#[ \t]*pragma[ \t]+unroll)[ \t]*\(.*$", re.MULTILINE)
_INCLUDE = re.compile(r'\s*#\s*include\s*[<"]([^>"]+)[>"]')


def include_directories() -> list[Path]:
    """Where pasted headers are looked for: the installed torch's, or METAL_HOST_TORCH_INCLUDE."""
    if override := os.environ.get("METAL_HOST_TORCH_INCLUDE"):
        return [Path(override)]
    import torch

    return [Path(torch.__file__).parent / "include"]


def expand(source: str, directories: list[Path]) -> str:
    """The source with its headers pasted in, `#line` directives at the seams."""
    if not isinstance(source, str):
        raise TypeError(f"compile_shader: source must be a str, got {type(source).__name__}")
    for number, line in enumerate(source.split("\n"), 1):
        if "__mh_" in line:
            raise refuse(MAIN, number, "names that begin with __mh_ belong to the runner")
    return _expand(source, MAIN, directories, set())


def _expand(text: str, name: str, directories: list[Path], done: set[Path]) -> str:
    out = [f'#line 1 "{name}"\n']
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("#pragma once"):
            out.append("\n")
            continue
        match = _INCLUDE.match(line)
        path = match and next((d / match[1] for d in directories if (d / match[1]).is_file()), None)
        if not match or not path:
            out.append(line + "\n")
        elif path in done:
            out.append("\n")
        else:
            done.add(path)
            out += (
                _expand(path.read_text(encoding="utf-8"), match[1], directories, done),
                f'#line {number + 1} "{name}"\n',
            )
    return "".join(out)


def preprocess(expanded: str, version: str, include: Sequence[Path] = ()) -> str:
    """Expand macros and the headers in the directories `include` as Metal's preprocessor would; no macro of the host
    compiler is defined."""
    flags = ["-E", "-x", "c++", "-std=c++14", "-undef", "-nostdinc", "-Wno-pragma-once-outside-header"]
    flags += [f"-D{name}={value}" for name, value in versions.macros(version).items()]
    for directory in (toolchain.INCLUDE, *include):
        flags += ["-I", str(directory)]
    # The preprocessor leaves macros in a pragma alone; the count changes nothing but speed.
    text = toolchain.clang([*flags, "-o", "-", "-"], input=_UNROLL_COUNT.sub(r"\1", expanded))
    if not text.isascii():
        _refuse_characters(text)
    return text


def _refuse_characters(text: str) -> None:
    """Only comments, which are gone here, and strings may hold characters outside ASCII."""
    tokens = Tokens(text)
    for i in range(len(tokens)):
        if not tokens[i].isascii() and tokens.kind[i] not in ("string", "character"):
            raise tokens.error(i, f"character {tokens[i]!r} outside a comment")
