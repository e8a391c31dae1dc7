"""Metal forbids recursion, which clang takes: look for a cycle among the calls of the unoptimised LLVM code."""

from __future__ import annotations

import re

from .errors import MetalSyntaxError

_DEFINE = re.compile(r'^define .*?@("[^"]+"|[\w.$]+)\(')
_CALL = re.compile(r'\bcall [^@\n]*@("[^"]+"|[\w.$]+)\(')


def check(code: str) -> None:
    """Raise MetalSyntaxError for a function that may call itself, directly or through others."""
    calls: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in code.split("\n"):
        if match := _DEFINE.match(line):
            current = calls.setdefault(match[1], set())
        elif "call " in line:
            current.update(_CALL.findall(line))
    finished: set[str] = set()
    for start, called in calls.items():
        path: list[str] = []
        stack = [(start, iter(called))] if start not in finished else []
        path += [start] if stack else []
        while stack:
            name, rest = stack[-1]
            following = next((c for c in rest if c in calls and c not in finished), None)
            if following is None:
                finished.add(name)
                stack.pop()
                path.pop()
            elif following in path:
                cycle = [_readable(n) for n in path[path.index(following) :]]
                raise MetalSyntaxError(
                    f"program_source: error: Metal has no recursion: {' -> '.join([*cycle, cycle[0]])}"
                )
            else:
                path.append(following)
                stack.append((following, iter(calls[following])))


def _readable(mangled: str) -> str:
    """The function's own name in an Itanium-mangled one."""
    name = mangled
    rest = mangled.removeprefix("_Z").removeprefix("N")
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
    return name
