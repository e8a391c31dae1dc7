"""What clang's C++ for OpenCL takes and Metal before 4.0 does not.

Checked on tokens; address spaces, C++17 and double are left to the compiler, recursion to recursion.py.
"""

from __future__ import annotations

from .tokens import Tokens

_SPACES = ("device", "constant", "threadgroup", "thread")
_FORBIDDEN = {
    "double": "Metal has no double",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no dynamic_cast",
    "typeid": "Metal has no typeid",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "new": "Metal has no operator new",
    "delete": "Metal has no operator delete",
    "goto": "Metal has no goto",
    "asm": "Metal has no inline assembly",
    "thread_local": "Metal has no thread_local",
    "vertex": "'vertex' is a keyword of Metal; only kernels can be compiled here",
    "fragment": "'fragment' is a keyword of Metal; only kernels can be compiled here",
    "concept": "Metal is C++14",
    "co_await": "Metal is C++14",
}
_COMPILER_NAMES = ("__func__", "__FUNCTION__", "__PRETTY_FUNCTION__", "__attribute__", "__always_inline__")
_VECTOR_CAST_BASES = (
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "bfloat",
    "float",
)
# What may stand before '[' where it opens a lambda and no subscript.
_BEFORE_LAMBDA = {"(", ",", "=", "{", "}", ";", "return", "&&", "||", "?", ":", "!", ""}


def check_tokens(tokens: Tokens) -> None:
    """Words and forms that are wrong wherever they stand."""
    for i in range(len(tokens)):
        word = tokens[i]
        if word in _FORBIDDEN and not (word == "delete" and tokens[i - 1] == "="):
            raise tokens.error(i, _FORBIDDEN[word])
        if (
            tokens.kind[i] == "word"
            and word.startswith("__")
            and word not in _COMPILER_NAMES
            and not word.startswith("__mh_")
        ):
            raise tokens.error(i, f"'{word}' is reserved for the compiler")
        if word == "[" and tokens[i + 1] != "[" and tokens[i - 1] in _BEFORE_LAMBDA and tokens[i - 1] != "[":
            close = tokens.partner[i]
            if tokens[close + 1] in ("(", "{") and not (tokens[i - 1] in ("{", ",") and tokens[close + 1] == "="):
                raise tokens.error(i, "Metal has no lambdas")
        cast = word == ")" and tokens[i + 1] == "(" and i - tokens.partner[i] == 2 and _is_vector(tokens[i - 1])
        if cast and _has_comma(tokens, i + 1):
            raise tokens.error(i, f"({tokens[i - 1]})(a, b) casts b alone; the constructor is {tokens[i - 1]}(a, b)")


def _is_vector(word: str) -> bool:
    return word[-1:] in ("2", "3", "4") and word[:-1] in _VECTOR_CAST_BASES


def _has_comma(tokens: Tokens, parenthesis: int) -> bool:
    i = parenthesis + 1
    while i < tokens.partner[parenthesis]:
        if tokens[i] == ",":
            return True
        i = tokens.partner[i] + 1 if tokens[i] in ("(", "[", "{") else i + 1
    return False


def check_pointers(tokens: Tokens, first: int, name: int, parenthesis: int) -> None:
    """Every pointer and reference of a function's signature names its address space."""
    ranges = []
    start = i = parenthesis + 1
    close = tokens.partner[parenthesis]
    while i <= close:
        if i == close or tokens[i] == ",":
            ranges.append((start, i))
            start = i + 1
        elif tokens[i] in ("(", "[", "{"):
            i = tokens.partner[i]
        elif tokens[i] == "<" and (angle := tokens.angle_close(i)) > 0:
            i = angle
        i += 1
    if not any(tokens[j] == "operator" for j in range(first, name + 1)):
        ranges.append((first, name))
    for start, end in ranges:
        _check_declarator(tokens, start, end)


def _check_declarator(tokens: Tokens, start: int, end: int) -> None:
    i = start
    spaced = False
    while i < end:
        word = tokens[i]
        if word in _SPACES:
            spaced = True
        elif word == "=":
            return
        elif word in ("(", "[", "{"):
            i = tokens.partner[i]
        elif word == "<" and (angle := tokens.angle_close(i)) > 0:
            i = angle
        elif word in ("*", "&", "&&") and not spaced:
            kind = "pointer" if word == "*" else "reference"
            raise tokens.error(i, f"a {kind} type must name its address space: device, constant, threadgroup or thread")
        i += 1


def check_body(tokens: Tokens, body: int) -> None:
    """Static locals, and pointers without an address space, in the function body that opens at token `body`."""
    i = body + 1
    while i < tokens.partner[body]:
        word = tokens[i]
        if word in ("struct", "class", "union", "enum"):
            brace = i
            while tokens[brace] not in ("{", ";", "(", ")", "=", "*", "&"):
                brace += 1
            i = tokens.partner[brace] if tokens[brace] == "{" else i
        elif word == "static":
            end = i
            while tokens[end] not in ("=", ";", "(", "{"):
                end += 1
            if "constant" not in [tokens[j] for j in range(i, end)]:
                raise tokens.error(i, "Metal has no static local variables outside the constant address space")
        elif word in ("*", "&") and _declares(tokens, i):
            kind = "pointer" if word == "*" else "reference"
            raise tokens.error(i, f"a {kind} type must name its address space: device, constant, threadgroup or thread")
        i += 1


def _declares(tokens: Tokens, star: int) -> bool:
    """Is `type * name =|;` at the start of a statement, without an address space?"""
    if tokens.kind[star + 1 : star + 2] != ["word"] or tokens[star + 2] not in ("=", ";", ":"):
        return False
    if tokens.kind[star - 1] == "number":
        return False
    i = star - 1
    angles = 0  # `i < count * width;` compares: a type has as many > as <
    while i > 0 and tokens[i] not in (";", "{", "}", "("):
        angles += (tokens[i] == ">") - (tokens[i] == "<")
        if tokens[i] in _SPACES or not (tokens.kind[i] in ("word", "number") or tokens[i] in ("::", "<", ">", ",")):
            return False
        if tokens[i] in ("return", "else", "case"):
            return False
        i -= 1
    if angles or (tokens[star + 2] == ";" and tokens[i] == "("):
        return False
    return not (tokens[i] == "(" and tokens[i - 1] not in ("for",))
