"""What clang's C++ for OpenCL takes and Metal before 4.0 does not.

Checked on tokens; address spaces, C++17 and double are left to the compiler, recursion to calls.py.
"""

from __future__ import annotations

from . import versions
from .kernels import Kernels
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
# Words of OpenCL's that Metal's compiler does not know.
_OPENCL = {f"__{w}" for w in ("global", "local", "private", "constant", "generic", "kernel", "read_only", "write_only")}
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


def check_tokens(tokens: Tokens, version: str) -> None:
    """Words and forms that are wrong wherever they stand in this version of the language."""
    absent, lambdas = versions.absent_words(version), versions.has_lambdas(version)
    for i in range(len(tokens)):
        word = tokens[i]
        if word in _FORBIDDEN and not (word == "delete" and tokens[i - 1] == "="):
            raise tokens.error(i, _FORBIDDEN[word])
        if word in _OPENCL:
            raise tokens.error(i, f"'{word}' is reserved for the compiler")
        if word in absent:
            raise tokens.error(i, absent[word])
        if (
            not lambdas
            and word == "["
            and tokens[i + 1] != "["
            and tokens[i - 1] in _BEFORE_LAMBDA
            and tokens[i - 1] != "["
        ):
            close = tokens.partner[i]
            if tokens[close + 1] in ("(", "{") and not (tokens[i - 1] in ("{", ",") and tokens[close + 1] == "="):
                raise tokens.error(i, f"Metal {version} has no lambdas")
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


def check_program_scope(tokens: Tokens, first: int, end: int) -> None:
    """Variables outside functions are constant: the declaration has its specifiers in tokens first..end-1."""
    words = [tokens[k] for k in range(first, end)]
    declares = end - first > 1 and not {"constant", "using", "typedef", "template", "struct", "class", "union"} & set(
        words
    )
    if (
        declares
        and words[0] not in ("enum", "friend", "extern", "static_assert", "namespace")
        and "sampler" not in words
    ):
        raise tokens.error(
            first, f"'{' '.join(words)}': a variable of program scope must be in the constant address space"
        )


def check_kernel_calls(tokens: Tokens, kernels: Kernels) -> None:
    """A kernel is called by the host alone."""
    known = [*kernels.templates.values(), *(i.kernel for i in kernels.instances.values())]
    names = {kernel.name for kernel in known}
    for kernel in known:
        for i in range(kernel.body + 1, kernel.end):
            if tokens[i] in names and tokens[i + 1] == "(" and tokens[i - 1] not in (".", "->", "::"):
                raise tokens.error(i, f"kernel '{tokens[i]}' is called; a kernel cannot be called")


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
    if tokens.kind[star - 1] != "word" and tokens[star - 1] != ">":
        return False  # `*p = x;` writes through a pointer
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
