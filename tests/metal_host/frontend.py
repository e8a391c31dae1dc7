"""From preprocessed Metal source to C++ for OpenCL, which clang compiles: one walk over the declarations.

What differs between the languages, and what is done about it:

* A kernel may be a template and is called by its host name: kernels become ordinary functions, each with a wrapper that
  fetches its arguments; an entry is emitted for every kernel or explicit instantiation.
* Threadgroup variables live in kernels only: each becomes a reference to storage that the back end lays out.
* `float4(a, b)` is no constructor of a vector type in C++: it becomes a call of __mh_make<float4>.
* A member function without an address space is `thread` in Metal, generic in OpenCL: it gets `thread`.
* Metal copies structs out of constant memory: classes get a defaulted copy constructor for it.
* A few words are keywords in OpenCL and names in Metal: they are renamed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .kernels import (
    IDENTIFIERS,
    SPACES,
    Instance,
    Kernel,
    Kernels,
    attributes,
    parse_arguments,
    split,
    string_value,
    template_names,
)
from .strictness import check_body, check_pointers, check_tokens
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
_QUALIFIERS = {"const", "volatile", *SPACES}


@dataclass
class ThreadgroupVariable:
    """One `threadgroup T name[n];` of a kernel."""

    name: str
    kernel: str
    file: str
    line: int


@dataclass
class Unit:
    """A translated source."""

    tokens: Tokens
    kernels: Kernels = field(default_factory=Kernels)
    variables: list[ThreadgroupVariable] = field(default_factory=list)

    def render(self, entries: dict[str, str]) -> str:
        """The source with an entry `symbol` for each instance: entries maps host names to symbols."""
        extra: dict[int, str] = {}
        for host_name, symbol in entries.items():
            instance = self.kernels.instances[host_name]
            extra[instance.at] = extra.get(instance.at, "") + instance.entry(symbol)
        return self.tokens.render(extra)


def translate(preprocessed: str) -> Unit:
    unit = Unit(Tokens(preprocessed))
    check_tokens(unit.tokens)
    aliases = _type_names(unit.tokens)
    _vector_aliases(unit.tokens)
    _rewrite_expressions(unit.tokens, aliases)
    _declarations(unit, 0, len(unit.tokens), ())
    _drop_identifier_attributes(unit.tokens)
    return unit


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


def _rewrite_expressions(tokens: Tokens, aliases: set[str]) -> None:
    for i in range(len(tokens)):
        word = tokens[i]
        if tokens.kind[i] != "word":
            continue
        previous = tokens[i - 1] if i else ""
        if word in _RENAMED and not (word in ("global", "local") and previous == "::"):
            tokens.text[i] = _RENAMED[word]
        if previous in (".", "->", "operator"):
            continue
        if tokens[i + 1] == "(":
            arguments = len(split(tokens, i + 2, tokens.partner[i + 1]))
            function_pointer = tokens[i + 2] == "*" and tokens[i + 4] == ")" and tokens[i + 5] == "("
            if (word in _VECTORS and not function_pointer) or (word in aliases and arguments > 1):
                tokens.prepend(i, "__mh_make<")
                tokens.append(i, ">")
        elif (
            word == "vec"
            and tokens[i + 1] == "<"
            and (close := tokens.angle_close(i + 1)) > 0
            and tokens[close + 1] == "("
        ):
            first = i - 2 if previous == "::" and tokens[i - 2] == "metal" else i
            if tokens[close + 2] not in ("*", "&"):
                tokens.prepend(first, "__mh_make<")
                tokens.append(close, ">")


def _vector_aliases(tokens: Tokens) -> None:
    """typedef vec<T, N> X, where T may be bool: clang has no vectors of bool, and where nothing is deduced, a class serves."""
    i = 0
    while i < len(tokens):
        alias = tokens[i] == "typedef" or (tokens[i] == "using" and tokens[i + 2] == "=" and tokens[i - 1] != ">")
        end = _skip_to(tokens, i, len(tokens), ";") if alias else i + 1
        for j in range(i, end):
            if tokens[j] == "vec" and tokens[j + 1] == "<" and (alias or tokens[j + 2] == "bool"):
                if tokens[j - 1] == "::":
                    tokens.blank(j - 2, j)
                tokens.text[j] = "__mh::vec_t"
        i = end


def _skip_to(tokens: Tokens, i: int, end: int, stops: str) -> int:
    """The first token from i on that is one of `stops`, brackets skipped."""
    while i < end and tokens[i] not in stops:
        i = tokens.partner[i] + 1 if tokens[i] in ("(", "[", "{") else i + 1
    return i


def _declarations(unit: Unit, start: int, end: int, namespace: tuple[str, ...], class_name: str = "") -> None:
    """Walk the declarations of a namespace or, with class_name, of a class."""
    tokens = unit.tokens
    i = start
    while i < end:
        word = tokens[i]
        if word in (";", "public", "private", "protected", ":"):
            i += 1
        elif word == "namespace" or (word == "inline" and tokens[i + 1] == "namespace"):
            brace = _skip_to(tokens, i, end, "{=;")
            if tokens[brace] == "{":
                path = [
                    tokens[j]
                    for j in range(i, brace)
                    if tokens.kind[j] == "word" and tokens[j] not in ("namespace", "inline")
                ]
                _declarations(unit, brace + 1, tokens.partner[brace], namespace + tuple(path))
                i = tokens.partner[brace] + 1
            else:
                i = brace + 1
        elif word in ("using", "static_assert", "typedef"):
            i = _class_or_skip(unit, i, end, namespace) if word == "typedef" else _skip_to(tokens, i, end, ";") + 1
        elif word == "extern" and tokens.kind[i + 1] == "string" and tokens[i + 2] == "{":
            _declarations(unit, i + 3, tokens.partner[i + 2], namespace)
            i = tokens.partner[i + 2] + 1
        elif word == "template" and tokens[i + 1] != "<":
            i = _instantiation(unit, i, end)
        else:
            i = _declaration(unit, i, end, namespace, class_name)


def _class_or_skip(unit: Unit, i: int, end: int, namespace: tuple[str, ...]) -> int:
    tokens = unit.tokens
    stop = _skip_to(tokens, i, end, ";{")
    if tokens[stop] == "{" and any(tokens[j] in ("struct", "class") for j in range(i, stop)):
        _class_body(unit, i, stop, namespace)
    return _skip_to(tokens, stop, end, ";") + 1


def _declaration(unit: Unit, first: int, end: int, namespace: tuple[str, ...], class_name: str) -> int:
    """One declaration that may be a class, a function or a variable; the token behind it."""
    tokens = unit.tokens
    template = None
    i = first
    while tokens[i] == "template":
        close = tokens.angle_close(i + 1)
        template = (i, close)
        i = close + 1
    specifiers = i
    parenthesis = -1
    while i < end:
        t = tokens[i]
        if t in ("struct", "class", "union", "enum"):
            brace = _skip_to(tokens, i, end, "{;(=")
            if tokens[brace] == "{":
                if t in ("struct", "class"):
                    _class_body(unit, i, brace, namespace)
                return _skip_to(tokens, tokens.partner[brace] + 1, end, ";") + 1
            if tokens[brace] == ";":
                return brace + 1
            i += 1
        elif t == "<" and (close := tokens.angle_close(i)) > 0:
            i = close + 1
        elif t == "operator":
            i += 1
            while tokens[i] != "(" or (tokens[i + 1] == ")" and tokens[i + 2] == "("):
                i += 1
            parenthesis = i
            break
        elif (t == "[" and tokens[i + 1] == "[") or (
            t == "(" and tokens[i - 1] in ("__attribute__", "alignas", "decltype")
        ):
            i = tokens.partner[i] + 1
        elif t == "(":
            parenthesis = i
            break
        elif t in ("=", "{", ";", ":"):
            return _skip_to(tokens, i, end, ";") + 1
        else:
            i += 1
    if parenthesis < 0:
        return end
    return _function(unit, specifiers, parenthesis, end, template, namespace, class_name)


def _function(
    unit: Unit,
    first: int,
    parenthesis: int,
    end: int,
    template: tuple[int, int] | None,
    namespace: tuple[str, ...],
    class_name: str,
) -> int:
    tokens = unit.tokens
    name = parenthesis - 1
    close = tokens.partner[parenthesis]
    specifiers = [tokens[j] for j in range(first, parenthesis)]
    i = close + 1
    while tokens[i] in _QUALIFIERS:
        i += 1
    is_constructor = tokens[name] == class_name or (tokens[name - 1] == "~")
    if class_name and not is_constructor and not {"static", "friend"} & set(specifiers):
        if not any(tokens[j] in SPACES for j in range(close + 1, i)):
            tokens.append(i - 1, " thread ")
    is_kernel = "kernel" in specifiers  # [[kernel]] too
    for j in range(first, name):
        if tokens[j] == "kernel":
            tokens.text[j] = ""
    body = _function_body(tokens, i, end)
    if body < 0:
        return _skip_to(tokens, i, end, ";") + 1
    found = attributes(tokens, first, parenthesis)
    if not is_kernel:
        check_pointers(tokens, first, name, parenthesis)
    check_body(tokens, body)
    _local_classes(unit, body, namespace)
    if is_kernel:
        _kernel(unit, first, name, body, found, template, namespace)
    return tokens.partner[body] + 1


def _function_body(tokens: Tokens, i: int, end: int) -> int:
    """The '{' of the function whose declarator ends before i, or -1 for a declaration only."""
    if tokens[i] == "->":
        i = _skip_to(tokens, i, end, "{;")
    if tokens[i] == ":":  # a constructor's initialisers: name(...) or name{...}, ...
        i += 1
        while i < end:
            while tokens[i] not in ("(", "{"):
                i = tokens.angle_close(i) + 1 if tokens[i] == "<" else i + 1
            i = tokens.partner[i] + 1
            if tokens[i] != ",":
                break
            i += 1
    while tokens[i] == "[" and tokens[i + 1] == "[":
        i = tokens.partner[i] + 1
    return i if tokens[i] == "{" else -1


def _local_classes(unit: Unit, body: int, namespace: tuple[str, ...]) -> None:
    tokens = unit.tokens
    i = body + 1
    while i < tokens.partner[body]:
        if tokens[i] in ("struct", "class"):
            brace = _skip_to(tokens, i, tokens.partner[body], "{;(=)*&")
            if tokens[brace] == "{":
                _class_body(unit, i, brace, namespace)
                i = tokens.partner[brace]
        i += 1


def _class_body(unit: Unit, keyword: int, brace: int, namespace: tuple[str, ...]) -> None:
    tokens = unit.tokens
    i = keyword + 1
    while tokens[i] in ("alignas", "__attribute__", "["):
        i = tokens.partner[i if tokens[i] == "[" else i + 1] + 1
    name = tokens[i]
    end = tokens.partner[brace]
    if tokens.kind[i] == "word" and tokens[i] not in ("struct", "class"):
        _copying(tokens, name, tokens[keyword], brace, end)
    _declarations(unit, brace + 1, end, namespace, class_name=name)


def _copying(tokens: Tokens, name: str, keyword: str, brace: int, end: int) -> None:
    """Give a class the copy constructors that Metal's classes have: from constant memory and from all other."""
    constructors = []
    i = brace + 1
    while i < end:
        if tokens[i] == name and tokens[i + 1] == "(" and tokens[i - 1] != "~":
            constructors.append(i)
        i = tokens.partner[i] + 1 if tokens[i] in ("(", "{", "[") else i + 1
    if any(tokens[j] == name for c in constructors for j in range(c + 2, tokens.partner[c + 1])):
        return  # its author wrote a copy constructor
    text = "" if constructors else f" {name}() = default;"
    text += f" {name}(const {name}&) = default; {name}(const constant {name}&) = default;"
    tokens.append(brace, f" public:{text}" + (" private:" if keyword == "class" else ""))


def _kernel(
    unit: Unit,
    first: int,
    name: int,
    body: int,
    found: dict[str, tuple[int, int]],
    template: tuple[int, int] | None,
    namespace: tuple[str, ...],
) -> None:
    tokens = unit.tokens
    parenthesis = name + 1
    if "void" not in [tokens[j] for j in range(first, name)]:
        raise tokens.error(name, f"kernel '{tokens[name]}' must return void")
    arguments = parse_arguments(tokens, parenthesis + 1, tokens.partner[parenthesis])
    limit = found.get("max_total_threads_per_threadgroup")
    host_name = string_value(tokens, *found["host_name"]) if "host_name" in found else tokens[name]
    kernel = Kernel(
        name=tokens[name],
        namespace=namespace,
        template=tokens.join(template[0], template[1] + 1) if template else "",
        template_arguments=", ".join(template_names(tokens, template[0] + 2, template[1])) if template else "",
        arguments=arguments,
        body=body,
        end=tokens.partner[body],
        host_name=host_name,
        max_threads=tokens.original(*limit) if limit else "1024",
    )
    _drop_attributes(tokens, first, tokens.partner[parenthesis])
    _threadgroup_variables(unit, kernel)
    tokens.append(kernel.end, kernel.wrapper())
    if template:
        unit.kernels.templates[kernel.name] = kernel
    else:
        unit.kernels.add(tokens, Instance(host_name, kernel, "", kernel.end))


def _drop_attributes(tokens: Tokens, first: int, last: int) -> None:
    i = first
    while i < last:
        if tokens[i] == "[" and tokens[i + 1] == "[":
            tokens.blank(i, tokens.partner[i] + 1)
            i = tokens.partner[i]
        i += 1


def _drop_identifier_attributes(tokens: Tokens) -> None:
    """Metal lets the parameters of ordinary functions carry a kernel's attributes, to no effect."""
    for i in range(len(tokens)):
        if (
            tokens[i] == "["
            and tokens[i + 1] == "["
            and set(attributes(tokens, i, tokens.partner[i])) & set(IDENTIFIERS)
        ):
            tokens.blank(i, tokens.partner[i] + 1)


def _threadgroup_variables(unit: Unit, kernel: Kernel) -> None:
    """Turn the kernel's threadgroup variables into references to storage of their own."""
    tokens = unit.tokens
    i = kernel.body + 1
    while i < kernel.end:
        if tokens[i] != "threadgroup" or tokens[i - 1] not in ("{", ";", "}", ")"):
            i += 1
            continue
        # threadgroup [alignas(n)] type declarator, declarator;
        j = i + 1
        if tokens[j] == "alignas":
            j = tokens.partner[j + 1] + 1
        type_start = j
        while not (tokens.kind[j] == "word" and tokens[j + 1] in ("[", ";", ",", "=", "{")):
            if tokens[j] in ("*", "&", "("):
                break  # a pointer or reference to threadgroup memory
            j = tokens.angle_close(j) + 1 if tokens[j] == "<" else j + 1
        end = _skip_to(tokens, i, kernel.end, ";")
        if tokens[j] in ("*", "&", "("):
            i = end
            continue
        type_ = tokens.join(type_start, j)
        text = ""
        for first, last in split(tokens, j, end):
            if any(tokens[k] in ("=", "{") for k in range(first, last)):
                raise tokens.error(first, f"threadgroup variable '{tokens[first]}' cannot have an initial value")
            file, line = tokens.place(first)
            number = len(unit.variables)
            unit.variables.append(ThreadgroupVariable(tokens[first], kernel.name, file, line))
            extents = tokens.join(first + 1, last)
            tag = f"__mh_tag_{number}"
            text += f"struct {tag} {{ enum {{ number = {number} }}; }}; "
            text += f"threadgroup {type_} (&{tokens[first]}){extents} = *__mh::threadgroup_variable<{tag}, {type_} {extents}>::get(); "
        if _depth(tokens, kernel, i):
            raise tokens.error(i, "threadgroup variables are declared in the outermost scope of a kernel")
        tokens.blank(i, end)
        tokens.append(i, text)
        i = end


def _depth(tokens: Tokens, kernel: Kernel, index: int) -> bool:
    """Is the token inside an inner block of the kernel?"""
    i = kernel.body + 1
    while i < index:
        if tokens[i] in ("{", "(") and tokens.partner[i] > index:
            return True
        i = tokens.partner[i] + 1 if tokens[i] in ("{", "(") else i + 1
    return False


def _instantiation(unit: Unit, first: int, end: int) -> int:
    """template [[host_name("x")]] [[kernel]] decltype(f<a>) f<a>;  or  template [[...]] kernel void f<a>(...);"""
    tokens = unit.tokens
    stop = _skip_to(tokens, first, end, ";")
    found = attributes(tokens, first, stop)
    kernel = None
    i = first + 1
    while i < stop:
        if tokens[i] == "[":
            i = tokens.partner[i]
        elif tokens[i] == "decltype":
            i = tokens.partner[i + 1]
        elif tokens[i] in unit.kernels.templates and tokens[i + 1] == "<":
            kernel = unit.kernels.templates[tokens[i]]
            arguments = tokens.join(i + 1, tokens.angle_close(i + 1) + 1)
            break
        i += 1
    if kernel is None:
        return stop + 1  # an ordinary function's or class's
    if "host_name" not in found:
        raise tokens.error(first, f"the instantiation of kernel '{kernel.name}' needs [[host_name(\"...\")]]")
    host_name = string_value(tokens, *found["host_name"])
    tokens.blank(first, stop)
    unit.kernels.add(tokens, Instance(host_name, kernel, arguments, stop))
    return stop + 1
