"""Function constants: values that a pipeline is made with, `constant bool causal [[function_constant(3)]];`.

They become constants of the source. One that got no value stays a declaration without a definition, so that the
compiler leaves no trace of it where is_function_constant_defined() guards it, and the runner can tell who reads it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from .kernels import attributes
from .tokens import Tokens

UNSET = "__mh_unset_"  # symbols of constants without a value
Value = bool | int | float | tuple
_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.LShift: lambda a, b: a << b,
    ast.BitOr: lambda a, b: a | b,
}


class Constants:
    """The function constants of a source, by name: their numbers, and the values they were given."""

    def __init__(self, tokens: Tokens, values: Mapping[str | int, Value]):
        self.numbers: dict[str, int] = {}
        self.values: dict[str, Value] = {}
        self.unset: set[str] = set()  # also constants computed from one
        for i in range(len(tokens)):
            if tokens[i] == tokens[i + 1] == "[" and tokens[(end := tokens.partner[i] + 1)] == ";":
                argument = attributes(tokens, i, end).get("function_constant")
                if argument:
                    self._declaration(tokens, i, argument, values)
        known = {*self.numbers, *self.numbers.values()}
        if unknown := [key for key in values if key not in known]:
            names = ", ".join(f"{name} ({number})" for name, number in self.numbers.items()) or "none"
            raise ValueError(f"constants: the source has no function constant {unknown[0]!r}; it has {names}")
        if self.numbers:
            self._defined(tokens)
            self._derived(tokens)

    def _declaration(
        self, tokens: Tokens, i: int, argument: tuple[int, int], values: Mapping[str | int, Value]
    ) -> None:
        name, end = tokens[i - 1], tokens.partner[i] + 1
        number = self.numbers[name] = _number(tokens, *argument)
        first = i - 1
        while first > 0 and tokens[first - 1] not in (";", "{", "}"):
            first -= 1
        specifiers = ("constant", "const", "static", "constexpr")
        type_ = " ".join(tokens[k] for k in range(first, i - 1) if tokens[k] not in specifiers)
        for k in range(first, i - 1):
            if tokens[k] in ("static", "constexpr"):
                tokens.text[k] = ""
        tokens.blank(i, end)
        value = values.get(name, values.get(number))
        if value is None:
            self.unset.add(name)
            _declare_only(tokens, first, i - 1, name)
        else:
            self.values[name] = value
            tokens.prepend(first, "constexpr ")
            tokens.append(end - 1, f" = {_literal(name, type_, value)}")

    def _defined(self, tokens: Tokens) -> None:
        for i in range(len(tokens)):
            if tokens[i] == "is_function_constant_defined" and tokens[i + 1] == "(":
                name = tokens[i + 2]
                if name not in self.numbers:
                    raise tokens.error(i, f"'{name}' is not a function constant")
                tokens.blank(i, tokens.partner[i + 1] + 1)
                tokens.append(i, "true" if name in self.values else "false")

    def _derived(self, tokens: Tokens) -> None:
        """A constant computed from one without a value has none either, unless it asks whether that one is defined."""
        i = -1
        while i + 1 < len(tokens):
            i += 1
            if tokens[i] == "(":
                i = tokens.partner[i]
            if tokens[i] != "constant" or tokens[i - 1] not in (";", "}", "{", "static", "constexpr", "const", ""):
                continue
            end = tokens.skip_to(i, len(tokens), ";")
            equals = tokens.skip_to(i, end, "=")
            name = tokens[equals - 1]
            pointer = any(tokens[k] in ("*", "&") for k in range(i, equals))
            if equals == end or pointer or tokens.kind[equals - 1] != "word":
                continue
            initial = range(equals + 1, end)
            asked = {tokens[k + 2] for k in initial if tokens[k] == "is_function_constant_defined"}
            if {tokens[k] for k in initial} & self.unset - asked:
                self.unset.add(name)
                tokens.blank(equals, end)
                _declare_only(tokens, i, equals - 1, name)

    def exists(self, name: str) -> bool | None:
        """Is an argument with [[function_constant(name)]] there? None: only the compiler could tell."""
        if name in self.values:
            return bool(self.values[name])
        return False if name in self.unset else None


def _declare_only(tokens: Tokens, first: int, last: int, name: str) -> None:
    tokens.prepend(first, "extern __attribute__((weak)) ")
    tokens.append(last, f' __asm__("{UNSET}{name}")')


def _number(tokens: Tokens, start: int, end: int) -> int:
    """The n of function_constant(n), which may be a sum of numbers."""
    text = tokens.original(start, end)
    if text.isdigit():  # also 01, which Python would not read
        return int(text)

    def value(node: Any) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(text)

    try:
        return value(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError):
        raise tokens.error(start, f"function_constant({text}): the index must be a number") from None


def _literal(name: str, type_: str, value: Value) -> str:
    if isinstance(value, (tuple, list)):
        return f"__mh_make<{type_}>({', '.join(_literal(name, '', v) for v in value)})"
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int):
        text = f"{value}{'ul' if value >= 1 << 63 else 'l' if abs(value) >= 1 << 31 else ''}"
    elif isinstance(value, float):
        finite = f"{value.hex()}f" if math.isfinite(value) else "__mh_infinity()"
        text = "__mh_nan()" if math.isnan(value) else f"-{finite}" if value == -math.inf else finite
    else:
        raise TypeError(f"constants: {name} must be a bool, an int, a float or a tuple of them, got {value!r}")
    return f"{type_}({text})" if type_ else text
