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
}
MAX_BUFFERS = 31
_SCALAR_IDS = {"uint", "ushort", "uint32_t", "uint16_t"}
_VECTOR_IDS = {f"{t}{n}" for t in ("uint", "ushort") for n in (2, 3)}


@dataclass
class Buffer:
    """A kernel argument that the caller binds."""

    index: int
    type: str  # as written, without name and attributes
    name: str
    space: str
    reference: bool

    def expression(self) -> str:
        pointer = self.type.rstrip("& ").rstrip() + "*" if self.reference else self.type
        return f"{'*' if self.reference else ''}({pointer})__mh_context.argument({self.index})"


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
        values = ", ".join(a if isinstance(a, str) else a.expression() for a in self.arguments)
        instance = f"{self.name}<{self.template_arguments}>" if self.template else self.name
        return (
            f" {self.template} inline __attribute__((always_inline))"
            f" void __mh_call_{self.name}(const thread __mh_context_t& __mh_context) {{ {instance}({values}); }}"
            f" {self.template} constexpr uint __mh_max_{self.name}() {{ return {self.max_threads}; }}"
        )


@dataclass
class Instance:
    """What the library offers under one name: a kernel, or a template's explicit instantiation."""

    host_name: str
    kernel: Kernel
    template_arguments: str  # "<half, 64>" or ""
    at: int  # the token behind which its entry may stand

    def entry(self, symbol: str) -> str:
        """The function that the host calls, and the most threads it may have; __MH_ENTRY is the back end's."""
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
        if stop - first > 1 and tokens.kind[stop - 1] == "word":
            names.append(tokens[stop - 1] + ("..." if pack else ""))
    return names


class _Parameter(NamedTuple):
    first: int  # its first token
    attributes: dict[str, tuple[int, int]]
    tokens: list[int]  # those that are no part of an attribute
    name: int


def parse_arguments(tokens: Tokens, start: int, end: int) -> list[Buffer | str]:
    """The parameter list of a kernel, tokens start..end-1."""
    arguments: list[Buffer | str] = []
    taken: set[int] = set()
    parameters = [] if start == end else split(tokens, start, end)
    parsed = []
    for first, last in parameters:
        found = attributes(tokens, first, last)
        kept = strip_attributes(tokens, first, last)
        names = [i for i in kept if tokens.kind[i] == "word"]
        name = next((i + 2 for i in kept if tokens[i] == "(" and tokens[i + 1] in "*&"), names[-1] if names else first)
        parsed.append(_Parameter(first, found, kept, name))
        if "buffer" in found:
            at = found["buffer"][0]
            if not tokens[at].isdigit():
                raise tokens.error(first, f"[[buffer(n)]] of '{tokens[name]}' needs a number, got '{tokens[at]}'")
            index = int(tokens[at])
            if index >= MAX_BUFFERS:
                raise tokens.error(
                    first, f"[[buffer({index})]] of '{tokens[name]}': a kernel has buffers 0 to {MAX_BUFFERS - 1}"
                )
            if index in taken:
                raise tokens.error(
                    first, f"[[buffer({index})]] of '{tokens[name]}' is bound to another parameter already"
                )
            taken.add(index)
    for parameter in parsed:
        first, found, _, name = parameter
        identifier = next((a for a in found if a in IDENTIFIERS), None)
        if identifier:
            arguments.append(_identifier(tokens, parameter, identifier))
            continue
        unknown = [a for a in found if a not in ("buffer", "maybe_unused")]
        if "threadgroup" in unknown:
            raise tokens.error(
                first,
                f"'{tokens[name]}': compile_shader cannot set the length of [[threadgroup(n)]] memory; "
                "declare an array in the kernel",
            )
        if unknown:
            raise tokens.error(first, f"attribute '{unknown[0]}' of '{tokens[name]}' is not known")
        arguments.append(_buffer(tokens, parameter, taken))
    return arguments


def _identifier(tokens: Tokens, parameter: _Parameter, attribute: str) -> str:
    first, _, kept, name = parameter
    number, vector = IDENTIFIERS[attribute]
    type_ = " ".join(tokens[i] for i in kept if i != name and tokens[i] != "const")
    allowed = _SCALAR_IDS | (_VECTOR_IDS if vector else set())
    if type_ not in allowed:
        raise tokens.error(first, f"[[{attribute}]] has type {' or '.join(sorted(allowed))}, not '{type_}'")
    size = int(type_[-1]) if type_ in _VECTOR_IDS else 1
    parts = ", ".join(f"__mh_context.identifier({number}, {axis})" for axis in range(size))
    return f"__mh_make<{type_}>({parts})"


def _buffer(tokens: Tokens, parameter: _Parameter, taken: set[int]) -> Buffer:
    first, found, kept, name = parameter
    words = [tokens[i] for i in kept]
    space = next((w for w in words if w in SPACES), "")
    if space == "threadgroup":
        raise tokens.error(
            first,
            f"'{tokens[name]}': a threadgroup parameter needs [[threadgroup(n)]], which compile_shader cannot size",
        )
    if space not in ("device", "constant"):
        raise tokens.error(
            first, f"'{tokens[name]}': a kernel's argument is a pointer or reference to device or constant memory"
        )
    reference = "&" in words
    if not reference and "*" not in words:
        raise tokens.error(first, f"'{tokens[name]}': a kernel's argument is a pointer or reference, not a value")
    if space == "constant" and reference and "*" in words:
        raise tokens.error(first, f"'{tokens[name]}': references to pointers cannot be bound")
    if "buffer" in found:
        index = int(tokens[found["buffer"][0]])
    else:  # Metal numbers the others in order
        index = next(i for i in range(MAX_BUFFERS + 1) if i not in taken)
        if index == MAX_BUFFERS:
            raise tokens.error(first, f"a kernel has at most {MAX_BUFFERS} buffers")
        taken.add(index)
    type_ = " ".join(tokens.render_token(i) for i in kept if i != name)
    if "( & )" in type_:  # an array's reference: T (&name)[n]
        return Buffer(index, type_.replace("( & )", "(*)"), tokens[name], space, False)
    return Buffer(index, type_, tokens[name], space, reference)
