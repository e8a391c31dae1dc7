"""Expressions and names: what Metal and C++ for OpenCL write differently inside declarations."""

from __future__ import annotations

import re

from .kernels import IDENTIFIERS, attributes
from .tokens import Tokens
from .vectors import Vectors

_RENAMED = {
    **{
        w: f"__mh_name_{w}"
        for w in ("global", "local", "generic", "pipe", "read_only", "write_only", "read_write", "event_t", "queue_t")
    },
    **{f"atomic_{t}": f"__mh_atomic_{t}" for t in ("int", "uint", "float", "bool", "ulong")},
}
# A literal without a suffix is a float; inside templates clang's -cl-single-precision-constant forgets it.
_UNSUFFIXED = re.compile(r"(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+|0[xX][0-9a-fA-F.]+[pP][+-]?\d+")
_BFLOAT = re.compile(r"([\d.]+(?:[eE][+-]?\d+)?)(?:bf|BF)")
_BUFFER_ATTRIBUTES = {"buffer", "threadgroup", "texture", "sampler"}


def rewrite(tokens: Tokens) -> None:
    """Vector constructors and casts, vectors of bool, literals, names that are OpenCL's keywords."""
    vectors = Vectors(tokens)
    _vector_aliases(tokens)
    for i in range(len(tokens)):
        kind, text = tokens.kind[i], tokens[i]
        if kind == "number":
            if _UNSUFFIXED.fullmatch(text):
                tokens.text[i] = text + "f"
            elif match := _BFLOAT.fullmatch(text):
                tokens.text[i] = f"((bfloat){match[1]}{'' if {'.', 'e'} & set(match[1].lower()) else '.'}f)"
        elif kind == "word":
            tokens.text[i] = _RENAMED.get(text, tokens.text[i])
            if text == "constant" and not {"const", "constexpr"} & {tokens[i - 2], tokens[i - 1], tokens[i + 1]}:
                tokens.prepend(i, "const ")  # Metal's constant objects are; OpenCL tells the two types apart
            if text == "decltype" and tokens[i - 1] in ("<", ",") and tokens.partner[i + 1] == i + 3:
                tokens.text[i] = "::metal::remove_addrspace_t<decltype"  # of an object's name: Metal's has none there
                tokens.append(i + 3, ">")
            if text == "coherent" and tokens[i + 1] == "(":  # how far writes are seen: here at once
                tokens.blank(i, tokens.partner[i + 1] + 1)
            vectors.word(i)
        elif text == "(":
            if _is_function_parameter(tokens, i):
                tokens.text[i + 1] = "&"
            vectors.parenthesis(i)
        elif text == "{":
            vectors.brace(i)


def _is_function_parameter(tokens: Tokens, i: int) -> bool:
    """The pointer to a function that is a template's parameter, `void (*f)(int)` or an alias `void (*)(int)` of one: C++
    for OpenCL has references to functions there, and no pointers. Token i is the first parenthesis."""
    name = i + 2 if tokens[i + 2] != ")" else i + 1
    if tokens[i + 1] != "*" or tokens[name + 1] != ")" or tokens[name + 2] != "(":
        return False
    if name > i + 1:
        return _is_template_parameter(tokens, i)
    equals = i
    while equals > 0 and tokens[equals] not in ("=", ";", "{", "}"):
        equals -= 1
    if tokens[equals - 2] != "using":
        return False
    uses = (k for k in range(i, len(tokens)) if tokens[k] == tokens[equals - 1])
    return any(_is_template_parameter(tokens, k) for k in uses)


def _is_template_parameter(tokens: Tokens, i: int) -> bool:
    """Does token i stand in the parameter list of a template?"""
    j = i
    while j > 0 and tokens[j] not in (";", "{", "}", "template"):
        j -= 1
    return tokens[j] == "template" and tokens[j + 1] == "<" and tokens.angle_close(j + 1) > i


def _vector_aliases(tokens: Tokens) -> None:
    """typedef vec<T, N> X, where T may be bool: clang has no vectors of bool, a class serves. `template <typename T> using X
    = vec<T, N>` must stay what T can be deduced from: where it is named, bytes serve."""
    templates = set()
    i = 0
    while i < len(tokens):
        alias = tokens[i] == "typedef" or (tokens[i] == "using" and tokens[i + 2] == "=" and tokens[i - 1] != ">")
        end = tokens.skip_to(i, len(tokens), ";") if alias else i + 1
        of_template = tokens[i] == "using" and tokens[i + 2] == "=" and tokens[i - 1] == ">"
        if of_template and "vec" in (tokens[j] for j in range(i, tokens.skip_to(i, len(tokens), ";"))):
            templates.add(tokens[i + 1])
        for j in range(i, end):
            if tokens[j] == "vec" and tokens[j + 1] == "<" and (alias or tokens[j + 2] == "bool"):
                if tokens[j - 1] == "::":
                    tokens.blank(j - 2, j)
                tokens.text[j] = "__mh::vec_t"
            if alias and tokens[j] in templates and tokens[j - 1] == "template" and tokens[j + 1] == "<":
                tokens.append(j + 1, "__mh::vector_element<")
                tokens.prepend(tokens.angle_close(j + 1), ">")
        i = end


def vectors_of_bool(tokens: Tokens, parameters: range, own: list[str]) -> None:
    """vec<T, N> among a member function's parameters, where T may be bool: not one of the function's `own` parameters, which
    are deduced from it."""
    for j in parameters:
        if tokens.text[j] == "vec" and tokens[j + 1] == "<" and tokens[j + 2] not in own:
            if tokens[j - 1] == "::":
                tokens.blank(j - 2, j)
            tokens.text[j] = "__mh::vec_t"


def drop_identifier_attributes(tokens: Tokens) -> None:
    """Metal lets the parameters of ordinary functions carry a kernel's attributes, to no effect."""
    ignored = {*IDENTIFIERS, *_BUFFER_ATTRIBUTES}
    for i in range(len(tokens)):
        if tokens[i] == "[" and tokens[i + 1] == "[" and set(attributes(tokens, i, tokens.partner[i] + 1)) & ignored:
            tokens.blank(i, tokens.partner[i] + 1)
