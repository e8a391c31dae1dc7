"""Expressions and names: what Metal and C++ for OpenCL write differently inside declarations."""

from __future__ import annotations

from .kernels import IDENTIFIERS, attributes, split
from .tokens import Tokens

_VECTORS = {
    f"{t}{n}"
    for t in ["bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float"]
    for n in (2, 3, 4)
}
_RENAMED = {
    **{
        w: f"__mh_name_{w}"
        for w in ("global", "local", "generic", "pipe", "read_only", "write_only", "read_write", "event_t", "queue_t")
    },
    **{f"atomic_{t}": f"__mh_atomic_{t}" for t in ("int", "uint", "float", "bool")},
}


def rewrite(tokens: Tokens) -> None:
    """Vector constructors, vectors of bool, names that are OpenCL's keywords."""
    aliases = _type_names(tokens)
    _vector_aliases(tokens)
    for i in range(len(tokens)):
        if tokens.kind[i] == "word":
            tokens.text[i] = _RENAMED.get(tokens[i], tokens.text[i])
            _constructor(tokens, i, aliases)


def _type_names(tokens: Tokens) -> set[str]:
    """Template type parameters and aliases: names whose T(a, b) may construct a vector."""
    names = set()
    for i in range(len(tokens)):
        if (
            tokens[i] in ("typename", "class")
            and tokens[i - 1] in ("<", ",")
            and tokens.kind[i + 1 : i + 2] == ["word"]
        ) or (tokens[i] == "using" and tokens[i + 2] == "="):
            names.add(tokens[i + 1])
        elif tokens[i] == "typedef":
            end = next(j for j in range(i, len(tokens)) if tokens[j] == ";")
            names.add(tokens[end - 1])
    return names


def _constructor(tokens: Tokens, i: int, aliases: set[str]) -> None:
    """T(a, b) at token i -> __mh_make<T>(a, b), where T is a vector type or may stand for one."""
    word, previous = tokens[i], tokens[i - 1]
    if previous in (".", "->", "operator"):
        return
    if tokens[i + 1] == "(":
        arguments = len(split(tokens, i + 2, tokens.partner[i + 1]))
        function_pointer = tokens[i + 2] == "*" and tokens[i + 4] == ")" and tokens[i + 5] == "("
        if (word in _VECTORS and not function_pointer) or (word in aliases and arguments > 1):
            tokens.prepend(i, "__mh_make<")
            tokens.append(i, ">")
    elif word == "vec" and tokens[i + 1] == "<" and tokens.text[i] == word:
        close = tokens.angle_close(i + 1)
        if close > 0 and tokens[close + 1] == "(" and tokens[close + 2] not in ("*", "&"):
            tokens.prepend(i - 2 if previous == "::" and tokens[i - 2] == "metal" else i, "__mh_make<")
            tokens.append(close, ">")


def _vector_aliases(tokens: Tokens) -> None:
    """typedef vec<T, N> X, where T may be bool: clang has no vectors of bool, a class serves."""
    i = 0
    while i < len(tokens):
        alias = tokens[i] == "typedef" or (tokens[i] == "using" and tokens[i + 2] == "=" and tokens[i - 1] != ">")
        end = tokens.skip_to(i, len(tokens), ";") if alias else i + 1
        for j in range(i, end):
            if tokens[j] == "vec" and tokens[j + 1] == "<" and (alias or tokens[j + 2] == "bool"):
                if tokens[j - 1] == "::":
                    tokens.blank(j - 2, j)
                tokens.text[j] = "__mh::vec_t"
        i = end


def drop_identifier_attributes(tokens: Tokens) -> None:
    """Metal lets the parameters of ordinary functions carry a kernel's attributes, to no effect."""
    for i in range(len(tokens)):
        if (
            tokens[i] == "["
            and tokens[i + 1] == "["
            and set(attributes(tokens, i, tokens.partner[i])) & set(IDENTIFIERS)
        ):
            tokens.blank(i, tokens.partner[i] + 1)
