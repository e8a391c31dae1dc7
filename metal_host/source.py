"""From the caller's string to one preprocessed text, line numbers kept.

`#include` works as in torch.mps.compile_shader: a header that exists below an include directory is pasted in, once;
every other one is left to the compiler, which finds Metal's own headers (include/).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import toolchain
from .errors import refuse

MAIN = "program_source"
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
        if not line.isascii():
            column = next(i for i, c in enumerate(line) if not c.isascii())
            raise refuse(
                MAIN, number, f"character {line[column]!r} in column {column + 1}: torch passes the source as ASCII"
            )
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


def preprocess(expanded: str) -> str:
    """Expand macros as Metal 3.1's preprocessor would; no macro of the host compiler is defined."""
    defines = {
        "__METAL__": 1,
        "__METAL_VERSION__": 310,
        "__METAL_MACOS__": 1,
        "__HAVE_BFLOAT__": 1,
        "__HAVE_SIMDGROUP_MATRIX__": 1,
    }
    return toolchain.clang(
        ["-E", "-x", "c++", "-std=c++14", "-undef", "-nostdinc", "-Wno-pragma-once-outside-header"]
        + [f"-D{name}={value}" for name, value in defines.items()]
        + ["-I", str(toolchain.INCLUDE), "-o", "-", "-"],
        input=expanded,
    )
