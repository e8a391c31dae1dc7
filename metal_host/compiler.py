"""Compiling a rendered source with clang, where Metal and clang disagree about an expression's types.

What no rule on tokens can decide, clang's own diagnostics do: they name the places, and the source is compiled again.

* A temporary binds to `const thread T&` in Metal, and its const member functions can be called. Here temporaries belong
  to no address space. Where a source does that, such references or functions take every address space.
* `half4 * float` converts the scalar to the vector's elements in Metal; clang wants that written out.
* Objects of a class cannot be assigned from constant memory, nor be a side of a conditional expression beside a temporary:
  they are read first.
* The index of a vector may be an object that converts to an integer.
* From float to bfloat there is no implicit conversion in Metal; clang has one, with a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import toolchain
from .errors import MetalSyntaxError

# What clang says of a temporary; of an object in memory it names the address space.
_ELSEWHERE = "(?!(?:const |volatile )*(?:device|threadgroup|constant|thread))"
_REFERENCE = re.compile(
    "bind reference in default address space|temporary object because of address space mismatch"
    f"|would make '[^']*thread [^']*' equal '{_ELSEWHERE}"
)
_OBJECT = re.compile(
    f"object parameter of type '[^']*thread [^']*' with an expression of type '{_ELSEWHERE}"
    "|'this' object is in default address space, but method expects object in address space 'thread'"
)
_RANK = "scalar operand type has greater rank than the type of the vector element"
_OPERANDS = r":\{(\d+):(\d+)-(\d+):(\d+)\}\{(\d+):(\d+)-(\d+):(\d+)\}: error: "
_RANK_RANGES = re.compile(rf"{_OPERANDS}{_RANK}\D*\('([^']*)'")
_CONDITIONAL = "incompatible operand types \\(|conditional expression is ambiguous"
_CONDITIONAL_RANGES = re.compile(f"{_OPERANDS}(?:{_CONDITIONAL})")
_ASSIGNMENT = "no viable overloaded '='"
_ASSIGNMENT_RANGES = re.compile(f"{_OPERANDS}{_ASSIGNMENT}")
_SUBSCRIPT = "type '[^\n]*does not provide a subscript operator"
_SUBSCRIPT_RANGES = re.compile(f"{_OPERANDS}{_SUBSCRIPT}")
_REPAIRABLE = re.compile(f"{_RANK}|{_CONDITIONAL}|{_ASSIGNMENT}|{_SUBSCRIPT}")
_MARKER = re.compile(r"^[ \t]*#[ \t]*(?:line[ \t]+)?\d+[^\n]*", re.MULTILINE)
_TO_BFLOAT = re.compile(
    r"^(.*?): warning: (implicit conversion (?:loses floating-point precision|changes).*?to '(?:const )?bfloat\d?'.*)$",
    re.MULTILINE,
)

# Parts of the library that few sources use (include/msl/prelude.h), and the words by which one does.
_PARTS = {
    "MATRICES": re.compile(r"\b(?:half|float)[234]x[234]\b|\bpacked_|\bmatrix<"),
    "TENSORS": re.compile(r"^#pragma metal_host tensors", re.MULTILINE),
    "LOGGING": re.compile(r"\bos_log"),
    "INTERNALS": re.compile(r"__metal_|__METAL_\w+_MATH__"),
}


@dataclass
class Binding:
    """Which places take temporaries, as macros of the source: `const thread T&`, and `this` of const members."""

    reference: bool = False
    this: bool = False

    def flags(self) -> list[str]:
        spaces = {"__mh_thread": self.reference, "__mh_this": self.this}
        return [f"-D{name}={'' if relaxed else '__private'}" for name, relaxed in spaces.items()]

    def relax(self, log: str) -> bool:
        """Learn from a log; False if it tells of nothing that could be relaxed."""
        if not self.reference and _REFERENCE.search(log):
            self.reference = True
        elif not self.this and _OBJECT.search(log):
            self.this = True
        else:
            return False
        return True


def compile_source(flags: list[str], source: str, binding: Binding) -> str:
    """clang's output. Raises MetalSyntaxError; `binding` remembers what it took for the next of the same source."""
    flags = [*flags, *(f"-D__MH_{name}" for name, words in _PARTS.items() if words.search(source))]
    while True:
        try:
            output, log = toolchain.clang_with_log(
                [*flags, *binding.flags(), "-Wimplicit-float-conversion", "-o", "-", "-"], source
            )
            break
        except MetalSyntaxError as error:
            if binding.relax(error.log):
                continue
            repaired = _repair(flags, source, binding) if _REPAIRABLE.search(error.log) else source
            if repaired == source:
                raise
            source = repaired
    if match := _TO_BFLOAT.search(log):
        raise MetalSyntaxError(f"{match[1]}: error: {match[2]}; Metal converts to bfloat only explicitly: bfloat(x)")
    return output


def _repair(flags: list[str], source: str, binding: Binding) -> str:
    """Write out the conversions that clang misses: of scalars beside vectors, and of objects to values."""
    plain = _MARKER.sub(lambda m: " " * len(m[0]), source)  # clang's lines are the text's
    ranges = "-fdiagnostics-print-source-range-info"
    log = toolchain.clang_log([*flags, *binding.flags(), "-fsyntax-only", "-ferror-limit=0", ranges, "-"], plain)
    text = source.encode()
    starts = [0]
    for line in text.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)

    def operands(match: re.Match[str]) -> tuple[slice, slice]:
        a, b, c, d = (starts[int(match[k]) - 1] + int(match[k + 1]) - 1 for k in (1, 3, 5, 7))
        return slice(a, b), slice(c, d)

    edits: dict[tuple[int, int], str] = {}
    for match in _RANK_RANGES.finditer(log):
        left, right = operands(match)
        vector, scalar = (left, right) if _is_vector(match[9]) else (right, left)
        edits[scalar.start, scalar.stop] = f"__mh_demote<decltype({text[vector].decode()})>"
    for match in _CONDITIONAL_RANGES.finditer(log):
        for side in operands(match):
            edits[side.start, side.stop] = "__mh_value"
    for match in _ASSIGNMENT_RANGES.finditer(log):
        side = operands(match)[1]
        edits[side.start, side.stop] = "__mh_value"
    for match in _SUBSCRIPT_RANGES.finditer(log):
        side = operands(match)[1]
        edits[side.start, side.stop] = "int"
    for (start, end), function in sorted(edits.items(), reverse=True):
        text = text[:start] + f"{function}({text[start:end].decode()})".encode() + text[end:]
    return text.decode()


def _is_vector(type_: str) -> bool:
    return re.search(r"(?:half|float|bfloat|char|short|int|long)\d$|ext_vector_type", type_) is not None
