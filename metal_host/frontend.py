"""From preprocessed Metal source to C++ for OpenCL, which clang compiles: one walk over the declarations.

What differs between the languages, and what is done about it:

* A kernel may be a template and is called by its host name: kernels become ordinary functions, each with a wrapper that
  fetches its arguments; an entry is emitted for every kernel or explicit instantiation.
* Threadgroup variables live in kernels only: each becomes a reference to storage that the back end lays out.
* `float4(a, b)` is no constructor of a vector type in C++: it becomes a call of __mh_make<float4>.
* A member function without an address space is `thread` in Metal, generic in OpenCL: it gets `thread`. A constructor
  without one makes temporaries too, which here belong to no address space: `thread` is taken from it.
* Metal copies structs out of constant memory: classes get a defaulted copy constructor for it.
* A few words are keywords in OpenCL and names in Metal: they are renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from . import versions
from .compiler import Binding, compile_source
from .constants import Constants, Value
from .kernels import SPACES, Instance, Kernel, Kernels, attributes, parse_arguments, split, string_value, template_names
from .rewrite import drop_identifier_attributes, rewrite, vectors_of_bool
from .strictness import check_body, check_kernel_calls, check_pointers, check_program_scope, check_tokens
from .threadgroup import ThreadgroupVariable, rewrite_threadgroup_variables
from .tokens import Tokens

_QUALIFIERS = {"const", "volatile", *SPACES}


@dataclass
class Unit:
    """A translated source."""

    tokens: Tokens
    constants: Constants
    version: str
    binding: Binding = field(default_factory=Binding)
    kernels: Kernels = field(default_factory=Kernels)
    variables: list[ThreadgroupVariable] = field(default_factory=list)

    def render(self, entries: dict[str, str]) -> str:
        """The source with an entry `symbol` for each instance: entries maps host names to symbols."""
        extra: dict[int, str] = {}
        for host_name, symbol in entries.items():
            instance = self.kernels.instances[host_name]
            extra[instance.at] = extra.get(instance.at, "") + instance.entry(symbol)
        return self.tokens.render(extra)

    def compile(self, flags: list[str], source: str) -> str:
        """clang's output for a rendered source."""
        return compile_source(flags, source, self.binding)


def translate(preprocessed: str, version: str, constants: Mapping[str | int, Value]) -> Unit:
    tokens = Tokens(preprocessed)
    check_tokens(tokens, version)
    unit = Unit(tokens, Constants(tokens, constants), version)
    rewrite(tokens)
    _declarations(unit, _Scope(0, len(tokens)))
    check_kernel_calls(tokens, unit.kernels)
    drop_identifier_attributes(tokens)
    return unit


@dataclass(frozen=True)
class _Scope:
    """Where a declaration stands: tokens start..end-1 of a namespace or of a class."""

    start: int
    end: int
    namespace: tuple[str, ...] = ()
    class_name: str = ""


@dataclass(frozen=True)
class _Function:
    """A function's declarator: first specifier, name, parentheses of the parameters; < and > of its template."""

    first: int
    name: int
    parenthesis: int
    close: int
    template: tuple[int, int] | None


def _declarations(unit: Unit, scope: _Scope) -> None:
    """Walk the declarations of a namespace or a class."""
    tokens, i, end = unit.tokens, scope.start, scope.end
    while i < end:
        word = tokens[i]
        if word in (";", "public", "private", "protected", ":"):
            i += 1
        elif word == "namespace" or (word == "inline" and tokens[i + 1] == "namespace"):
            i = _namespace(unit, i, scope)
        elif word in ("using", "static_assert"):
            i = tokens.skip_to(i, end, ";") + 1
        elif word == "typedef":
            stop = tokens.skip_to(i, end, ";{")
            if tokens[stop] == "{" and any(tokens[j] in ("struct", "class") for j in range(i, stop)):
                _class_body(unit, i, stop, scope)
            i = tokens.skip_to(stop, end, ";") + 1
        elif word == "extern" and tokens.kind[i + 1] == "string" and tokens[i + 2] == "{":
            _declarations(unit, _Scope(i + 3, tokens.partner[i + 2], scope.namespace))
            i = tokens.partner[i + 2] + 1
        elif word == "template" and tokens[i + 1] != "<":
            i = _instantiation(unit, i, end)
        else:
            i = _declaration(unit, i, scope)


def _namespace(unit: Unit, i: int, scope: _Scope) -> int:
    tokens = unit.tokens
    brace = tokens.skip_to(i, scope.end, "{=;")
    if tokens[brace] != "{":  # an alias
        return brace + 1
    words = [tokens[j] for j in range(i, brace) if tokens.kind[j] == "word"]
    path = tuple(w for w in words if w not in ("namespace", "inline"))
    _declarations(unit, _Scope(brace + 1, tokens.partner[brace], scope.namespace + path))
    return tokens.partner[brace] + 1


def _declaration(unit: Unit, i: int, scope: _Scope) -> int:
    """One declaration that may be a class, a function or a variable; the token behind it."""
    tokens, end = unit.tokens, scope.end
    template = None
    while tokens[i] == "template":
        close = tokens.template_close(i + 1)
        template = (i, close)
        i = close + 1
    first = i
    while i < end:
        t = tokens[i]
        if t in ("struct", "class", "union", "enum"):
            brace = tokens.skip_to(i, end, "{;(=")
            if tokens[brace] == "{":
                if t in ("struct", "class"):
                    _class_body(unit, i, brace, scope)
                return tokens.skip_to(tokens.partner[brace] + 1, end, ";") + 1
            if tokens[brace] == ";":
                return brace + 1
            i += 1
        elif t == "<" and (close := tokens.angle_close(i)) > 0:
            i = close + 1
        elif t == "[" or (t == "(" and tokens[i - 1] in ("__attribute__", "alignas", "decltype")):
            i = tokens.partner[i] + 1
        elif t in ("=", "{", ";", ":"):
            if not scope.class_name:
                check_program_scope(tokens, first, i)
                words = {tokens[k] for k in range(first, i)}
                if t == ";" and {"constant", "::", "constexpr"} <= words:
                    tokens.blank(first, i)  # a class's constant, which has its value there
            return tokens.skip_to(i, end, ";") + 1
        elif t == "operator":
            i += 1
            while tokens[i] != "(" or (tokens[i + 1] == ")" and tokens[i + 2] == "("):
                i += 1
            return _function(unit, _Function(first, i - 1, i, tokens.partner[i], template), scope)
        elif t == "(":
            return _function(unit, _Function(first, i - 1, i, tokens.partner[i], template), scope)
        else:
            i += 1
    return end


def _function(unit: Unit, function: _Function, scope: _Scope) -> int:
    tokens = unit.tokens
    specifiers = {tokens[j] for j in range(function.first, function.parenthesis)}
    i = function.close + 1
    while tokens[i] in _QUALIFIERS:
        i += 1
    if scope.class_name:
        own = template_names(tokens, function.template[0] + 2, function.template[1]) if function.template else []
        vectors_of_bool(tokens, range(function.parenthesis, function.close), own)
    if scope.class_name and not specifiers & {"static", "friend"}:
        _member_function(unit, function, range(function.close + 1, i), scope)
    is_kernel = "kernel" in specifiers  # as an attribute too
    for j in range(function.first, function.name):
        if tokens[j] == "kernel":
            tokens.text[j] = ""
    body = _function_body(tokens, i, scope.end)
    if body < 0:
        return tokens.skip_to(i, scope.end, ";") + 1
    if not is_kernel:
        check_pointers(tokens, function.first, function.name, function.parenthesis)
        _bind_temporaries(tokens, function.parenthesis + 1, function.close)
    check_body(tokens, body)
    _local_classes(unit, body, scope)
    if is_kernel:
        _kernel(unit, function, body, scope.namespace)
    return tokens.partner[body] + 1


def _member_function(unit: Unit, function: _Function, qualifiers: range, scope: _Scope) -> None:
    """The address space of `this`; `qualifiers` are the tokens between the parameters and the body."""
    tokens = unit.tokens
    spaces = [j for j in qualifiers if tokens[j] in SPACES]
    if tokens[function.name] == scope.class_name or tokens[function.name - 1] == "~":
        for j in spaces:
            tokens.text[j] = "" if tokens[j] == "thread" else tokens.text[j]
            tokens.before.pop(j, None)
    elif not spaces and versions.has_generic_this(unit.version):
        return
    else:
        returns_member = any(tokens[j] in ("&", "*") for j in range(function.first, function.name))
        takes_temporaries = any(tokens[j] == "const" for j in qualifiers) and not returns_member
        if not spaces:
            tokens.append(qualifiers.stop - 1, " __mh_this " if takes_temporaries else " thread ")
        elif takes_temporaries and [tokens[j] for j in spaces] == ["thread"] and _is_operator(tokens, function):
            tokens.text[spaces[0]] = "__mh_this"


def _is_operator(tokens: Tokens, function: _Function) -> bool:
    return any(tokens[j] == "operator" for j in range(function.first, function.parenthesis))


def _bind_temporaries(tokens: Tokens, start: int, end: int) -> None:
    """`const thread T& x`, to which a temporary may be bound."""
    for first, last in split(tokens, start, end):
        words = [tokens[k] for k in range(first, last)]
        if {"const", "thread", "&"} <= set(words) and not {"*", "(", "["} & set(words):
            at = first + words.index("thread")
            tokens.text[at] = "__mh_thread"


def _function_body(tokens: Tokens, i: int, end: int) -> int:
    """The '{' of the function whose declarator ends before i, or -1 for a declaration only."""
    if tokens[i] == "->":
        i = tokens.skip_to(i, end, "{;")
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


def _local_classes(unit: Unit, body: int, scope: _Scope) -> None:
    tokens = unit.tokens
    i = body + 1
    while i < tokens.partner[body]:
        if tokens[i] in ("struct", "class"):
            brace = tokens.skip_to(i, tokens.partner[body], "{;(=)*&")
            if tokens[brace] == "{":
                _class_body(unit, i, brace, scope)
                i = tokens.partner[brace]
        i += 1


def _class_body(unit: Unit, keyword: int, brace: int, scope: _Scope) -> None:
    tokens = unit.tokens
    i = keyword + 1
    while tokens[i] in ("alignas", "__attribute__", "["):
        i = tokens.partner[i if tokens[i] == "[" else i + 1] + 1
    name = tokens[i]
    if tokens.kind[i] == "word" and name not in ("struct", "class"):
        _copying(tokens, name, brace, private=tokens[keyword] == "class")
    _declarations(unit, _Scope(brace + 1, tokens.partner[brace], scope.namespace, class_name=name))


def _copying(tokens: Tokens, name: str, brace: int, private: bool) -> None:
    """Give a class the copy constructors that Metal's classes have: from constant memory and from all other."""
    end = tokens.partner[brace]
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
    tokens.append(brace, f" public:{text}" + " private:" * private)


def _kernel(unit: Unit, function: _Function, body: int, namespace: tuple[str, ...]) -> None:
    tokens, template = unit.tokens, function.template
    name = tokens[function.name]
    if "void" not in [tokens[j] for j in range(function.first, function.name)]:
        raise tokens.error(function.name, f"kernel '{name}' must return void")
    found = attributes(tokens, function.first, function.parenthesis)
    limit = found.get("max_total_threads_per_threadgroup")
    host_name = string_value(tokens, *found["host_name"]) if "host_name" in found else name
    kernel = Kernel(
        name=name,
        namespace=namespace,
        template=tokens.join(template[0], template[1] + 1) if template else "",
        template_arguments=", ".join(template_names(tokens, template[0] + 2, template[1])) if template else "",
        arguments=parse_arguments(tokens, function.parenthesis + 1, function.close),
        body=body,
        end=tokens.partner[body],
        max_threads=tokens.original(*limit) if limit else "1024",
    )
    _drop_attributes(tokens, function.first, function.close)
    rewrite_threadgroup_variables(tokens, kernel, unit.variables)
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


def _instantiation(unit: Unit, first: int, end: int) -> int:
    """template [[host_name("x")]] [[kernel]] decltype(f<a>) f<a>;  or  template [[...]] kernel void f<a>(...);

    The second may leave <a> away, to be deduced from its parameters.
    """
    tokens = unit.tokens
    stop = tokens.skip_to(first, end, ";")
    found = attributes(tokens, first, stop)
    i = first + 1
    while i < stop and not (tokens[i] in unit.kernels.templates and tokens[i + 1] in ("<", "(")):
        if tokens[i] == "[":
            i = tokens.partner[i]
        i = tokens.partner[i + 1] if tokens[i] == "decltype" else i + 1
    if i >= stop:
        return stop + 1  # an ordinary function's or class's
    kernel, deduced = unit.kernels.templates[tokens[i]], tokens[i + 1] == "("
    if "host_name" not in found:
        raise tokens.error(first, f"the instantiation of kernel '{kernel.name}' needs [[host_name(\"...\")]]")
    if deduced:
        arguments = parse_arguments(tokens, i + 2, tokens.partner[i + 1])
        kernel = replace(kernel, template="", template_arguments="", arguments=arguments)
    text = "" if deduced else tokens.join(i + 1, tokens.angle_close(i + 1) + 1)
    host_name = string_value(tokens, *found["host_name"])
    tokens.blank(first, stop)
    unit.kernels.add(tokens, Instance(host_name, kernel, text, stop, deduced))
    return stop + 1
