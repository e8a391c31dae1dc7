"""Vectors and matrices: constructors, casts and initialisers.

C++ for OpenCL knows neither `float4(a, b)` nor conversions between vector types. All that makes a value of a type that
may be a vector becomes a call of __mh_make<T> (include/msl/types.h); for every other type that is T(...) again.
"""

from __future__ import annotations

from .kernels import split
from .tokens import Tokens

_ELEMENTS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float")
VECTORS = {f"{t}{n}" for t in _ELEMENTS for n in (2, 3, 4)}
_PACKED = {f"packed_{t}{n}" for t in _ELEMENTS if t != "bool" for n in (2, 3, 4)}
_MATRICES = {f"{t}{columns}x{rows}" for t in ("half", "float") for columns in (2, 3, 4) for rows in (2, 3, 4)}
_BUILT_IN = VECTORS | _PACKED | _MATRICES
_SCALARS = {*_ELEMENTS, "size_t", *(f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64))}
_STATEMENT_STARTS = (";", "{", "}", ")", "const", "constexpr", "thread")
_UNARY = ("*", "&", "-", "+", "!", "~")


class Vectors:
    """The rewriting of one source."""

    def __init__(self, tokens: Tokens):
        self._tokens = tokens
        self._dependent = type_names(tokens)  # may stand for a vector type
        if "bfloat" in tokens.text:  # clang has no cast between the two
            self._dependent |= {"half", "bfloat"}

    def word(self, i: int) -> None:
        """The word at token i, if it names a type that may be a vector."""
        tokens = self._tokens
        if tokens[i] == "static_cast":
            self._static_cast(i)
        elif tokens[i] in _BUILT_IN and self._variable(i):
            return
        elif tokens[i - 1] not in (".", "->", "operator"):
            self._constructor(i)

    def _static_cast(self, i: int) -> None:
        tokens = self._tokens
        close = tokens.angle_close(i + 1)
        words = {tokens[k] for k in range(i + 2, close)}
        may_be_vector = words & (_BUILT_IN | self._dependent | {"typename", "vec", "decltype", "::"})
        if close > 0 and may_be_vector and not words & {"&", "*"}:
            tokens.text[i] = "__mh_make"

    def _variable(self, i: int) -> bool:
        """`float2 v(a, b);` and `float4 v = {a, b};`, which leaves the other elements 0."""
        tokens = self._tokens
        if tokens.kind[i + 1 : i + 2] != ["word"]:
            return False
        name = i + 1
        if tokens[name + 1] == "(":
            close = tokens.partner[name + 1]
            if tokens[i - 1] not in _STATEMENT_STARTS or tokens[close + 1] not in (";", ",") or close == name + 2:
                return False
            inside = range(name + 2, close)
            if any(tokens.kind[k] == tokens.kind[k + 1] == "word" for k in inside):
                return False  # parameters: a function is declared
            tokens.append(name, f" = __mh_make<{tokens[i]}>")
            return True
        if tokens[name + 1] not in ("=", "{") or tokens[i] not in VECTORS:
            return False
        end = tokens.skip_to(name, len(tokens), ";")
        for first, last in split(tokens, name, end):
            brace = first + 1 + (tokens[first + 1] == "=")
            if tokens[brace] != "{" or tokens.partner[brace] != last - 1:
                continue
            if 0 < len(split(tokens, brace + 1, last - 1)) < int(tokens[i][-1]):
                tokens.text[brace] = f"{'' if tokens[first + 1] == '=' else ' = '}__mh_list<{tokens[i]}>("
                tokens.text[last - 1] = ")"
        return False

    def _constructor(self, i: int) -> None:
        """T(a, b) at token i -> __mh_make<T>(a, b)."""
        tokens = self._tokens
        word, previous = tokens[i], tokens[i - 1]
        if tokens[i + 1] == "(":
            if word in _BUILT_IN or word in self._dependent:
                if self._declares(i, i + 1) or (word in self._dependent and not self._constructs(i)):
                    return
                tokens.prepend(i, "__mh_make<")
                tokens.append(i, ">")
        elif word == "vec" and tokens[i + 1] == "<" and tokens.text[i] == word:
            close = tokens.angle_close(i + 1)
            if close > 0 and tokens.kind[close + 1] == "word" and tokens[close + 2] == "{":
                self._listed(i, close)
            if close > 0 and tokens[close + 1] == "(" and not self._declares(i, close + 1):
                tokens.prepend(i - 2 if previous == "::" and tokens[i - 2] == "metal" else i, "__mh_make<")
                tokens.append(close, ">")

    def _listed(self, i: int, close: int) -> None:
        """`vec<T, N> v{a};`, which leaves the other elements 0. Token `close` is the last of the type."""
        tokens, brace = self._tokens, close + 2
        if tokens.partner[brace] > brace + 1:
            tokens.text[brace] = f" = __mh_list<{tokens.join(i, close + 1)}>("
            tokens.text[tokens.partner[brace]] = ")"

    def _declares(self, i: int, parenthesis: int) -> bool:
        """T (*name)(...), T (&name)[n], T(...) as the type of a function."""
        tokens = self._tokens
        behind = tokens[tokens.partner[parenthesis] + 1]
        return tokens[parenthesis + 1] in ("*", "&") and behind in ("(", "[")

    def _constructs(self, i: int) -> bool:
        """Is the name of a template parameter or alias before '(' an expression T(a), and no declarator?"""
        tokens = self._tokens
        close = tokens.partner[i + 1]
        if close == i + 2 or tokens[i - 1] in ("~", "explicit", "typename", "class", "&"):
            return False
        if tokens[i - 1] == "::":
            return False
        begins = tokens[i - 1] in (*_STATEMENT_STARTS, ">", "inline")
        return not (begins and tokens[close + 1] in ("{", ":"))  # a constructor with a body or initialisers

    def brace(self, i: int) -> None:
        """f({a, b, c}), where the parameter may be a vector: clang has no such conversion."""
        tokens = self._tokens
        close = tokens.partner[i]
        if tokens[i - 1] not in ("(", ",") or tokens[close + 1] not in (")", ",") or close == i + 1:
            return
        elements = split(tokens, i + 1, close)
        inside = range(i + 1, close)
        if not 2 <= len(elements) <= 4 or not self._is_argument(i) or any(tokens[k] in (";", "{") for k in inside):
            return
        tokens.text[i], tokens.text[close] = "__mh_braces(", ")"

    def _is_argument(self, i: int) -> bool:
        """Does token i stand in the arguments of a call?"""
        tokens = self._tokens
        i -= 1
        while i >= 0 and tokens[i] not in ("(", "[", "{", ";"):
            i = tokens.partner[i - 1] if tokens[i - 1] in (")", "]", "}") else i - 1
        return tokens[i] == "(" and (tokens.kind[i - 1] == "word" or tokens[i - 1] == ">")

    def parenthesis(self, i: int) -> None:
        """(float4)x -> __mh_make<float4>(x), where token i is the first parenthesis."""
        tokens = self._tokens
        close = tokens.partner[i]
        if not self._is_type(i + 1, close) or tokens[close + 1] == "{":
            return
        before = tokens[i - 1]
        if i and tokens.kind[i - 1] == "word" and before not in ("return", "else"):
            return
        if before in (")", "]", ">"):
            return
        end = self._operand_end(close + 1)
        if end < 0:
            return
        tokens.text[i] = "__mh_make<"
        tokens.text[close] = ">("
        tokens.append(end - 1, ")")

    def _is_type(self, start: int, end: int) -> bool:
        """Is (start..end-1) the name of a type that may be a vector?"""
        tokens = self._tokens
        if end - start == 1:
            return tokens[start] in _BUILT_IN or tokens[start] in self._dependent
        return tokens[start] == "vec" and tokens[start + 1] == "<" and tokens.angle_close(start + 1) == end - 1

    def _operand_end(self, k: int) -> int:
        """The token behind the operand of a cast that begins at k, or -1."""
        tokens = self._tokens
        while tokens[k] in _UNARY:
            k += 1
        if tokens[k] == "(":
            close = tokens.partner[k]
            if self._is_type(k + 1, close) or (close == k + 2 and tokens[k + 1] in _SCALARS):
                return self._operand_end(close + 1)
            k = close + 1
        elif k < len(tokens) and tokens.kind[k] in ("word", "number"):
            if tokens[k] in ("return", "else", "const"):
                return -1
            k += 1
            while tokens[k] == "::":
                k += 2
            if tokens[k] == "<" and (close := tokens.angle_close(k)) > 0 and tokens[close + 1] == "(":
                k = close + 1
        else:
            return -1
        while True:
            if tokens[k] in ("[", "("):
                k = tokens.partner[k] + 1
            elif tokens[k] in (".", "->"):
                k += 2
            else:
                return k


def type_names(tokens: Tokens) -> set[str]:
    """Template type parameters and aliases: names whose T(a, b) may construct a vector."""
    names = set()
    for i in range(len(tokens)):
        if (
            tokens[i] in ("typename", "class")
            and tokens[i - 1] in ("<", ",")
            and tokens.kind[i + 1 : i + 2] == ["word"]
        ):
            if tokens[i + 2] in (",", ">", "="):
                names.add(tokens[i + 1])
        elif tokens[i] == "using" and tokens[i + 2] == "=":
            names.add(tokens[i + 1])
        elif tokens[i] == "typedef":
            names.add(tokens[tokens.skip_to(i, len(tokens), ";") - 1])
    return names
