"""Who calls whom in the unoptimised LLVM code: recursion, which Metal forbids, and function constants without a value."""

from __future__ import annotations

import re

from .constants import UNSET
from .errors import MetalSyntaxError

_DEFINE = re.compile(r'^define .*?@("[^"]+"|[\w.$]+)\(')
_CALL = re.compile(r'\bcall [^@\n]*@("[^"]+"|[\w.$]+)\(')
_BRANCH = re.compile(r"br label %([\w.]+)")
_UNSET = re.compile(rf'@"?(?:\\01)?({UNSET}\w+)')


def graph(code: str) -> dict[str, set[str]]:
    """Function -> the functions that it calls, and the constants without a value that it reads.

    A function that calls itself last and returns nothing is left out: Metal's compiler makes a loop of it.
    """
    calls: dict[str, set[str]] = {}
    current: set[str] = set()
    name, lines = "", code.split("\n")
    for number, line in enumerate(lines):
        if match := _DEFINE.match(line):
            name = match[1]
            current = calls.setdefault(name, set())
        else:
            if "call " in line:
                found = _CALL.findall(line)
                current.update(f for f in found if f != name or not _returns(lines, number + 1))
            if UNSET in line:
                current.update(_UNSET.findall(line))
    return calls


def _returns(lines: list[str], at: int) -> bool:
    """Does the code from line `at` on do nothing but return?"""
    for _ in range(100):
        line = lines[at].strip()
        if line == "ret void":
            return True
        if match := _BRANCH.match(line):
            at = next((k for k in range(at, len(lines)) if lines[k].startswith(f"{match[1]}:")), -1)
            if at < 0:
                return False
        elif line and "lifetime.end" not in line:
            return False
        at += 1
    return False


def unset_constants(calls: dict[str, set[str]], entry: str) -> list[str]:
    """The names of the function constants without a value that `entry` or what it calls reads."""
    reached, waiting = {entry}, [entry]
    while waiting:
        new = calls.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return sorted(name.removeprefix(UNSET) for name in reached if name.startswith(UNSET))


def check_recursion(calls: dict[str, set[str]]) -> None:
    """Raise MetalSyntaxError for a function that may call itself, directly or through others."""
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
