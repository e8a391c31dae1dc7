"""The source of a module that asks for flash_attn, as a syntax tree; and where in it a running function stands.

The tree, and not the bytecode: it has the same shape in every version of Python. A module without its source (a frozen
program, `exec` of a string) is left as it is.
"""

from __future__ import annotations

import ast
import linecache
import types
from collections.abc import Iterator
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COULD_NOT_IMPORT = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
_LEAVES = {"exit", "_exit", "quit"}

_read: dict[str, tuple[list[str], Source | None]] = {}


class Source:
    """A syntax tree whose nodes know their parents."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self.nodes = list(ast.walk(self.tree))
        self.parent = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self._calls: dict[int, list[ast.expr]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Call | ast.Await):
                self._calls.setdefault(node.lineno, []).append(node)

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The parents of a node, from the inside out."""
        while node in self.parent:
            node = self.parent[node]
            yield node

    def scope(self, node: ast.AST) -> ast.AST:
        """The function that a node belongs to, or the module."""
        return next((up for up in self.above(node) if isinstance(up, _FUNCTIONS)), self.tree)

    def functions(self, name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """All functions and methods of that name."""
        return [n for n in self.nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == name]

    def call_at(self, where: Position) -> ast.expr | None:
        """The call, or the await of one, at exactly that position; None if no single one fits."""
        found = self._calls.get(where.line, [])
        if where.column is None:  # Python 3.10, and -X no_debug_ranges
            return found[0] if len(found) == 1 else None
        fits = [n for n in found if (n.col_offset, n.end_col_offset) == (where.column, where.end_column)]
        return fits[0] if len(fits) == 1 else None

    def is_guarded(self, node: ast.AST) -> bool:
        """Does the program go on if that import fails? Handlers that only raise or leave do not count."""
        inside = node
        for up in self.above(node):
            if isinstance(up, _FUNCTIONS):
                return False
            if isinstance(up, ast.Try) and inside in up.body and any(map(_recovers, up.handlers)):
                return True
            if isinstance(up, ast.With) and any("suppress" in ast.dump(item.context_expr) for item in up.items):
                return True
            inside = up
        return False


class Position:
    """Where a function stands: a file, a line and, from Python 3.11 on, the columns of the call that it waits for."""

    def __init__(self, file: str, line: int, column: int | None, end_column: int | None) -> None:
        self.file = file
        self.line = line
        self.column = column
        self.end_column = end_column

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def position(frame: types.FrameType) -> Position:
    code = frame.f_code
    if hasattr(code, "co_positions") and frame.f_lasti >= 0:
        for number, (line, _, column, end_column) in enumerate(code.co_positions()):
            if number == frame.f_lasti // 2:
                return Position(code.co_filename, line or frame.f_lineno, column, end_column)
    return Position(code.co_filename, frame.f_lineno, None, None)


def lines_of(file: str, namespace: dict[str, Any] | None = None) -> list[str]:
    """The lines of a file, of a member of an archive, or of a notebook's cell; none if they are not at hand."""
    return linecache.getlines(file, namespace)


def read(file: str, namespace: dict[str, Any] | None = None) -> Source | None:
    """The `Source` of a file; None if there is none, or if it cannot be parsed."""
    lines = lines_of(file, namespace)
    known = _read.get(file)
    if known is None or known[0] is not lines:
        try:
            known = lines, Source("".join(lines)) if lines else None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            known = lines, None
        _read[file] = known
    return known[1]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression of names and attributes; what is neither is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names of the exceptions of a handler; "BaseException" if it names none."""
    if handler.type is None:
        return {"BaseException"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {dotted(kind).rpartition(".")[2] for kind in kinds}


def _recovers(handler):
    if not caught(handler) & _COULD_NOT_IMPORT:
        return False
    last = handler.body[-1]
    call = last.value if isinstance(last, ast.Expr) else None
    leaves = isinstance(call, ast.Call) and dotted(call.func).rpartition(".")[2] in _LEAVES
    return not (leaves or isinstance(last, ast.Raise))
