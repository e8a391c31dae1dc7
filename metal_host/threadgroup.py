"""Threadgroup variables of a kernel: each becomes a reference to storage that the back end lays out."""

from __future__ import annotations

from dataclasses import dataclass

from .kernels import Kernel, split
from .tokens import Tokens

_ZEROS = ("", "0", "0.0", "0.0f", "0.f", "false")


@dataclass
class ThreadgroupVariable:
    """One `threadgroup T name[n];` of a kernel."""

    name: str
    kernel: str
    file: str
    line: int


def rewrite_threadgroup_variables(tokens: Tokens, kernel: Kernel, variables: list[ThreadgroupVariable]) -> None:
    """Rewrite `threadgroup T name[n];` in the kernel's body, and add the variables found to `variables`.

    They have no initial value but zero, and each thread that passes the declaration writes it.
    """
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
        end = tokens.skip_to(i, kernel.end, ";")
        if tokens[j] in ("*", "&", "("):
            i = end
            continue
        type_ = tokens.join(type_start, j)
        text = ""
        for first, last in split(tokens, j, end):
            stop = next((k for k in range(first, last) if tokens[k] in ("=", "{")), last)
            if "".join(tokens[k] for k in range(stop, last)).strip("={}") not in _ZEROS:
                raise tokens.error(first, f"threadgroup variable '{tokens[first]}' cannot have an initial value")
            file, line = tokens.place(first)
            number = len(variables)
            variables.append(ThreadgroupVariable(tokens[first], kernel.name, file, line))
            extents = tokens.join(first + 1, stop)
            tag = f"__mh_tag_{number}"
            text += f"struct {tag} {{ enum {{ number = {number} }}; }}; "
            storage = f"__mh::threadgroup_variable<{tag}, {type_} {extents}>"
            text += f"threadgroup {type_} (&{tokens[first]}){extents} = *{storage}::get(); "
            if stop < last:
                text += f"__mh_clear(&{tokens[first]}); "
        tokens.blank(i, end)
        tokens.append(i, text)
        i = end
