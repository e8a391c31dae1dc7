"""Kernels of a source: their signatures, bindings and instantiations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .tokens import Tokens

SPACES = ("device", "constant", "threadgroup", "thread")

# attribute -> (number known to the back ends, vector allowed)
IDENTIFIERS = {
    "thread_position_in_grid": (0, True),
    "threads_per_grid": (1, True),
    "threadgroup_position_in_grid": (2, True),
    "threadgroups_per_grid": (3, True),
    "thread_position_in_threadgroup": (4, True),
    "threads_per_threadgroup": (5, True),
    "dispatch_threads_per_threadgroup": (6, True),
    "thread_index_in_threadgroup": (7, False),
    "thread_index_in_simdgroup": (8, False),
    "simdgroup_index_in_threadgroup": (9, False),
    "simdgroups_per_threadgroup": (10, False),
    "dispatch_simdgroups_per_threadgroup": (10, False),
    "threads_per_simdgroup": (11, False),
    "thread_execution_width": (11, False),
    "thread_index_in_quadgroup": (12, False),
    "quadgroup_index_in_threadgroup": (13, False),
    "quadgroups_per_threadgroup": (14, False),
    "dispatch_quadgroups_per_threadgroup": (14, False),
}
MAX_BUFFERS = 31
_SCALAR_IDS = {"uint", "ushort", "uint32_t", "uint16_t"}
_VECTOR_IDS = {f"{t}{n}" for t in ("uint", "ushort") for n in (2, 3)}


@dataclass
class Buffer:
    """A kernel argument that the caller binds, or, of space "threadgroup", gives a length."""

    index: int
    type: str  # as written, without name and attributes
    name: str
    space: str
    reference: bool
    condition: str = ""  # the function constant without which the argument does not exist

    def expression(self) -> str:
        pointer = self.type.rstrip("& ").rstrip() + "*" if self.reference else self.type
        source = "threadgroup_argument" if self.space == "threadgroup" else "argument"
        return f"{'*' if self.reference else ''}({pointer})__mh_context.{source}({self.index})"


@dataclass
class Kernel:
    """A kernel function, perhaps a template."""

    name: str
    namespace: tuple[str, ...]
    template: str  # "template <...>" or ""
    template_arguments: str  # "T, D" or ""
    arguments: list[Buffer | str]  # a str is the expression of an identifier
    end: int  # token of the body's '}'
    body: int  # token of the body's '{'
    max_threads: str  # an expression

    @property
    def path(self) -> str:
        return "".join(f"{n}::" for n in self.namespace if n) + "__mh_call_" + self.name

    def wrapper(self) -> str:
        """The function that fetches the arguments and calls the kernel; it stands behind it, on its last line."""
        instance = f"{self.name}<{self.template_arguments}>" if self.template else self.name
        return (
            f"{self.caller(f'__mh_call_{self.name}', instance)}"
            f" {self.template} constexpr uint __mh_max_{self.name}() {{ return {self.max_threads}; }}"
        )

    def caller(self, name: str, callee: str) -> str:
        """A function `name` that calls `callee` with the kernel's arguments."""
        values = ", ".join(a if isinstance(a, str) else a.expression() for a in self.arguments)
        return (
            f" {self.template} inline __attribute__((always_inline))"
            f" void {name}(const thread __mh_context_t& __mh_context) {{ {callee}({values}); }}"
        )


@dataclass
class Instance:
    """What the library offers under one name: a kernel, or a template's explicit instantiation."""

    host_name: str
    kernel: Kernel
    template_arguments: str  # "<half, 64>" or ""
    at: int  # the token behind which its entry may stand
    deduced: bool = False  # the instantiation names its parameters' types, not the template's arguments

    def entry(self, symbol: str) -> str:
        """The function that the host calls, and the most threads it may have; __MH_ENTRY is the back end's."""
        if self.deduced:
            caller = f"__mh_deduced_{self.at}"
            return f"{self.kernel.caller(caller, self.kernel.name)} __MH_ENTRY({symbol}, ({caller}), ({self.kernel.max_threads}))"
        call = f"{self.kernel.path}{self.template_arguments}"
        limit = f"{call.replace('__mh_call_', '__mh_max_')}()"
        return f" __MH_ENTRY({symbol}, ({call}), ({limit}))"


@dataclass
class Kernels:
    templates: dict[str, Kernel] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)

    def add(self, tokens: Tokens, instance: Instance) -> None:
        if instance.host_name in self.instances:
            raise tokens.error(instance.at, f"two kernels have the name '{instance.host_name}'")
        self.instances[instance.host_name] = instance


def attributes(tokens: Tokens, start: int, end: int) -> dict[str, tuple[int, int]]:
    """The attributes [[a, b(x)]] among tokens start..end-1: name -> its argument's token range."""
    found = {}
    i = start
    while i < end:
        if tokens[i] == "[" and tokens[i + 1] == "[":
            close = tokens.partner[i + 1]
            i += 2
            while i < close:
                name = i
                while tokens[i + 1] == "::":  # clang::..., metal::...
                    i = name = i + 2
                if tokens[i + 1] == "(":
                    found[tokens[name]] = (i + 2, tokens.partner[i + 1])
                    i = tokens.partner[i + 1] + 1
                else:
                    found[tokens[name]] = (i + 1, i + 1)
                    i += 1
                i += tokens[i] == ","
            i = close + 2
        else:
            i += 1
    return found


def strip_attributes(tokens: Tokens, start: int, end: int) -> list[int]:
    """The tokens start..end-1 that are no part of an attribute."""
    kept = []
    i = start
    while i < end:
        if tokens[i] == "[" and tokens[i + 1] == "[":
            i = tokens.partner[i] + 1
        else:
            kept.append(i)
            i += 1
    return kept


def string_value(tokens: Tokens, start: int, end: int) -> str:
    return "".join(tokens[i][1:-1] for i in range(start, end) if tokens.kind[i] == "string")


def split(tokens: Tokens, start: int, end: int) -> list[tuple[int, int]]:
    """Ranges between the commas of a list, brackets and template arguments apart."""
    parts = []
    i = first = start
    while i < end:
        t = tokens[i]
        if t == ",":
            parts.append((first, i))
            first = i + 1
        elif i in tokens.partner and tokens.partner[i] > i:
            i = tokens.partner[i]
        elif t == "<" and (close := tokens.angle_close(i)) > 0:
            i = close
        i += 1
    if first < end:
        parts.append((first, end))
    return parts


def template_names(tokens: Tokens, start: int, end: int) -> list[str]:
    """The parameter names of template <start..end-1>."""
    names = []
    for first, last in split(tokens, start, end):
        stop = next((i for i in range(first, last) if tokens[i] == "="), last)
        pack = any(tokens[i] == "..." for i in range(first, stop))
        function = next((i + 2 for i in range(first, stop) if tokens[i] == "(" and tokens[i + 1] in ("*", "&")), None)
        if function is not None:  # void (*name)(...)
            names.append(tokens[function])
            continue
        if stop - first > 1 and tokens.kind[stop - 1] == "word":
            names.append(tokens[stop - 1] + ("..." if pack else ""))
    return names


class _Parameter(NamedTuple):
    first: int  # its first token
    attributes: dict[str, tuple[int, int]]
    tokens: list[int]  # those that are no part of an attribute or an array's extents
    name: int
    array: bool  # T name[n]


def parse_arguments(tokens: Tokens, start: int, end: int) -> list[Buffer | str]:
    """The parameter list of a kernel, tokens start..end-1."""
    parameters = [] if start == end else [_parameter(tokens, *part) for part in split(tokens, start, end)]
    taken: dict[str, set[int]] = {"buffer": set(), "threadgroup": set()}
    for parameter in parameters:
        for kind in taken.keys() & parameter.attributes.keys():
            _claim(tokens, parameter, kind, taken[kind])
    _check_identifiers(tokens, parameters)
    arguments: list[Buffer | str] = []
    for parameter in parameters:
        if identifier := next((a for a in parameter.attributes if a in IDENTIFIERS), None):
            arguments.append(_identifier(tokens, parameter, identifier))
            continue
        unknown = set(parameter.attributes) - {"buffer", "threadgroup", "function_constant", "maybe_unused"}
        if unknown:
            raise tokens.error(
                parameter.first, f"attribute '{unknown.pop()}' of '{tokens[parameter.name]}' is not known"
            )
        arguments.append(_buffer(tokens, parameter, taken["buffer"]))
    return arguments


def _parameter(tokens: Tokens, first: int, last: int) -> _Parameter:
    kept = [i for i in strip_attributes(tokens, first, last) if tokens.text[i]]
    names = [i for i in kept if tokens.kind[i] == "word"]
    name = next((i + 2 for i in kept if tokens[i] == "(" and tokens[i + 1] in "*&"), names[-1] if names else first)
    bracket = next((i for i in kept if tokens[i] == "[" and tokens[tokens.partner[i] - 1] != "]"), None)
    array = bracket is not None and tokens[bracket - 1] != ")"
    if array:
        name = bracket - 1
        kept = [i for i in kept if i < bracket]
    return _Parameter(first, attributes(tokens, first, last), kept, name, array)


def _claim(tokens: Tokens, parameter: _Parameter, kind: str, taken: set[int]) -> None:
    """The n of [[buffer(n)]] or [[threadgroup(n)]]: a number below 31 that no other parameter has."""
    at, stop = parameter.attributes[kind]
    name = tokens[parameter.name]
    if stop - at != 1 or not tokens[at].isdigit():
        raise tokens.error(
            parameter.first, f"[[{kind}(n)]] of '{name}' needs a number, got '{tokens.original(at, stop)}'"
        )
    index = int(tokens[at])
    if index >= MAX_BUFFERS:
        raise tokens.error(
            parameter.first, f"[[{kind}({index})]] of '{name}': a kernel has {kind}s 0 to {MAX_BUFFERS - 1}"
        )
    if index in taken:
        raise tokens.error(parameter.first, f"[[{kind}({index})]] of '{name}' is bound to another parameter already")
    taken.add(index)


def _check_identifiers(tokens: Tokens, parameters: list[_Parameter]) -> None:
    """What Metal asks of a kernel's positions together."""
    seen: dict[str, _Parameter] = {}
    sizes: dict[int, _Parameter] = {}
    for parameter in parameters:
        for attribute in parameter.attributes.keys() & IDENTIFIERS.keys():
            seen[attribute] = parameter
            if IDENTIFIERS[attribute][1]:
                type_ = next((tokens[i] for i in parameter.tokens if tokens[i] in _SCALAR_IDS | _VECTOR_IDS), "")
                sizes.setdefault(int(type_[-1]) if type_ in _VECTOR_IDS else 1, parameter)
    if len(sizes) > 1:
        one, other = (tokens[p.name] for p in list(sizes.values())[:2])
        message = f"'{one}' and '{other}': positions and sizes of a kernel must have the same number of components"
        raise tokens.error(max(p.first for p in sizes.values()), message)
    for pair in (("threads_per_simdgroup", "thread_execution_width"),):
        if all(name in seen for name in pair):
            raise tokens.error(seen[pair[1]].first, f"[[{pair[0]}]] and [[{pair[1]}]] are one attribute: use one")


def _identifier(tokens: Tokens, parameter: _Parameter, attribute: str) -> str:
    number, vector = IDENTIFIERS[attribute]
    type_ = " ".join(tokens[i] for i in parameter.tokens if i != parameter.name and tokens[i] != "const")
    allowed = _SCALAR_IDS | (_VECTOR_IDS if vector else set())
    if type_ not in allowed:
        raise tokens.error(parameter.first, f"[[{attribute}]] has type {' or '.join(sorted(allowed))}, not '{type_}'")
    size = int(type_[-1]) if type_ in _VECTOR_IDS else 1
    parts = ", ".join(f"__mh_context.identifier({number}, {axis})" for axis in range(size))
    return f"__mh_make<{type_}>({parts})"


def _buffer(tokens: Tokens, parameter: _Parameter, taken: set[int]) -> Buffer:
    first, found, kept, name, array = parameter
    words = [tokens[i] for i in kept]
    space = next((w for w in words if w in SPACES), "")
    if space == "threadgroup" and "threadgroup" not in found:
        raise tokens.error(first, f"'{tokens[name]}': a threadgroup parameter needs [[threadgroup(n)]]")
    if space not in ("device", "constant", "threadgroup") or (space != "threadgroup" and "threadgroup" in found):
        raise tokens.error(
            first, f"'{tokens[name]}': a kernel's argument is a pointer or reference to device or constant memory"
        )
    reference = "&" in words
    if not reference and not array and "*" not in words:
        raise tokens.error(first, f"'{tokens[name]}': a kernel's argument is a pointer or reference, not a value")
    if space == "constant" and reference and "*" in words:
        raise tokens.error(first, f"'{tokens[name]}': references to pointers cannot be bound")
    if space == "threadgroup":
        index = int(tokens[found["threadgroup"][0]])
    elif "buffer" in found:
        index = int(tokens[found["buffer"][0]])
    else:  # Metal numbers the others in order
        index = next(i for i in range(MAX_BUFFERS + 1) if i not in taken)
        if index == MAX_BUFFERS:
            raise tokens.error(first, f"a kernel has at most {MAX_BUFFERS} buffers")
        taken.add(index)
    type_ = " ".join(tokens.render_token(i) for i in kept if i != name) + "*" * array
    condition = tokens.original(*found["function_constant"]) if "function_constant" in found else ""
    if "( & )" in type_:  # an array's reference: T (&name)[n]
        return Buffer(index, type_.replace("( & )", "(*)"), tokens[name], space, False, condition)
    return Buffer(index, type_, tokens[name], space, reference, condition)
