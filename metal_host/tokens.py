"""Tokens of preprocessed Metal source, with their places, and edits on them.

Edits never add or remove a line, so that the compiler's line numbers stay those of the source.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache
from pathlib import Path

from .errors import MetalSyntaxError, refuse

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<directive>^[ \t]*\#[^\n]*)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<character>'(?:\\.|[^'\\\n])*')
      | (?P<operator><<=|>>=|\.\.\.|::|->|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.VERBOSE | re.MULTILINE,
)
_LINE_MARKER = re.compile(r'\s*#(?:line)?\s+(\d+)(?:\s+"([^"]*)")?')
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_TAKES_ARGUMENTS = {
    *("template", "operator", "static_cast", "reinterpret_cast", "const_cast", "as_type", "declval", "make_uniform"),
    *("make_filled_simdgroup_matrix", "make_diagonal_simdgroup_matrix"),
}


class Tokens:
    """A source as a list of its words and signs, white space apart.

    text[i] is the i-th token, before[i] and after[i] what edits put around it, partner[i] the other bracket of a pair.
    """

    def __init__(self, source: str):
        self.text: list[str] = []
        self.kind: list[str] = []
        self.partner: dict[int, int] = {}
        self.before: dict[int, str] = {}
        self.after: dict[int, str] = {}
        self._space: list[str] = []  # white space and directives before token i
        self._offset: list[int] = []
        self._markers: list[tuple[int, str, int, int]] = []  # (offset, file, line of the next line, newlines so far)
        self._newlines = [m.start() for m in re.finditer("\n", source)]
        pending: list[str] = []
        open_brackets: list[int] = []
        for match in _TOKEN.finditer(source):
            kind, text = match.lastgroup or "", match.group()
            if kind in ("space", "directive"):
                pending.append(text)
                if kind == "directive" and (marker := _LINE_MARKER.match(text)):
                    self._mark(match.start(), marker)
                continue
            index = len(self.text)
            self.text.append(text)
            self.kind.append(kind)
            self._offset.append(match.start())
            self._space.append("".join(pending))
            pending.clear()
            if text in _PAIRS:
                open_brackets.append(index)
            elif text in ")]}":
                if not open_brackets or _PAIRS[self.text[open_brackets[-1]]] != text:
                    raise self.error(index, f"extraneous '{text}'")
                self.partner[index] = open_brackets[-1]
                self.partner[open_brackets.pop()] = index
        if open_brackets:
            raise self.error(open_brackets[-1], f"unmatched '{self.text[open_brackets[-1]]}'")
        self._tail = "".join(pending)
        self.text_original = list(self.text)
        self.templates = _TAKES_ARGUMENTS | library_templates() | self._templates()

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> str:
        """The i-th token as written; empty beyond both ends."""
        return self.text_original[index] if 0 <= index < len(self.text_original) else ""

    def _mark(self, offset: int, marker: re.Match[str]) -> None:
        file = marker.group(2) or (self._markers[-1][1] if self._markers else "")
        self._markers.append((offset, file, int(marker.group(1)), bisect_right(self._newlines, offset)))

    def place(self, index: int) -> tuple[str, int]:
        """(file, line) of a token."""
        offset = self._offset[index]
        line = bisect_right(self._newlines, offset)
        at = bisect_right(self._markers, offset, key=lambda m: m[0]) - 1
        if at < 0:
            return "program_source", line + 1
        _, file, first, newlines = self._markers[at]
        return file, first + line - newlines - 1

    def error(self, index: int, message: str) -> MetalSyntaxError:
        return refuse(*self.place(index), message)

    def _templates(self) -> set[str]:
        """Names that the source declares as templates: a '<' behind one opens arguments."""
        names = set()
        for i in range(len(self)):
            if self[i] != "template" or self[i + 1] != "<":
                continue
            known = _TAKES_ARGUMENTS | library_templates() | names
            j = self._angle_close(i + 1, known) + 1
            while 0 < j < len(self) and self[j] not in ("(", ";", "{", "=", ":"):
                close = self._angle_close(j, known) if self[j] == "<" else -1
                j = max(j, close) + 1
            if j > 0 and self.kind[j - 1] == "word":
                names.add(self[j - 1])
        return names

    def angle_close(self, index: int) -> int:
        """The '>' that closes the '<' at index, or -1 if this is a comparison."""
        return self._angle_close(index, self.templates)

    def template_close(self, index: int) -> int:
        """The '>' of `template <...>`, whose '<' is at index."""
        if (close := self.angle_close(index)) < 0:
            raise self.error(index, "unmatched '<' of a template")
        return close

    def _angle_close(self, index: int, templates: set[str]) -> int:
        depth = 0
        i = index
        while i < len(self):
            t = self[i]
            if t == "<":
                # Inside the list a '<' compares, unless it follows the name of a template.
                if i == index or self[i - 1] in templates:
                    depth += 1
            elif t == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif t in _PAIRS:
                i = self.partner[i]
            elif t in (";", ")", "]", "}", ""):
                return -1
            i += 1
        return -1

    def skip_to(self, index: int, end: int, stops: str) -> int:
        """The first token from index on that is one of the signs `stops`, brackets skipped; end if there is none."""
        while index < end and self[index] not in stops:
            index = self.partner[index] + 1 if self[index] in ("(", "[", "{") else index + 1
        return index

    def join(self, start: int, end: int) -> str:
        """Tokens start..end-1 on one line, as edited."""
        return " ".join(self.render_token(i) for i in range(start, end) if self.render_token(i))

    def original(self, start: int, end: int) -> str:
        return " ".join(self.text_original[start:end])

    def blank(self, start: int, end: int) -> None:
        for i in range(start, end):
            self.text[i] = ""
            self.before.pop(i, None)
            self.after.pop(i, None)

    def prepend(self, index: int, text: str) -> None:
        self.before[index] = text + self.before.get(index, "")

    def append(self, index: int, text: str) -> None:
        self.after[index] = self.after.get(index, "") + text

    def render_token(self, index: int) -> str:
        return self.before.get(index, "") + self.text[index] + self.after.get(index, "")

    def render(self, extra: dict[int, str] | None = None) -> str:
        """The edited source; `extra` adds text after tokens for this rendering only."""
        extra = extra or {}
        parts = []
        for i in range(len(self.text)):
            parts += (self._space[i], self.render_token(i))
            if i in extra:
                parts.append(extra[i])
        return "".join(parts) + self._tail


@cache
def library_templates() -> frozenset[str]:
    """The templates that Metal's library declares (include/)."""
    headers = Path(__file__).parent / "include" / "msl"
    names = ("traits.h", "atomic.h", "simdgroup_matrix.h", "tensor.h", "cooperative_tensor.h", "matmul2d.h")
    text = "".join((headers / name).read_text() for name in names)
    declared = re.findall(r"template\s*<[^;{}()]*>\s*(?:struct|class|using)\s+([a-z]\w+)", text)
    declared += re.findall(r"^__MH_(?:TRAIT|STRIP)\((\w+)", text, re.MULTILINE)
    return frozenset(f"{name}{suffix}" for name in declared for suffix in ("", "_t", "_v")) | {"vec"}
