"""What a simdgroup does, instruction by instruction: a kernel's code (metal_host/apple.py) interpreted for 32 lanes.

Memory holds zeros, but for `constant` buffers, so a trace is of a call without data-dependent branches, or of the side
that zeros take. Addresses are right: from them come the cache lines and the banks that an access touches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LANES = 32
_ARGUMENTS = 31  # 64-bit addresses, before the grid and the group
_SHARED_APART = 1 << 16  # bytes from one threadgroup variable to the next

_TYPES = {
    **{
        f"{kind}{bits}": f"{code}{bits // 8}"
        for kind, code in (("u", "u"), ("b", "u"), ("s", "i"))
        for bits in (8, 16, 32, 64)
    },
    **{"f16": "f2", "f32": "f4", "f64": "f8", "pred": "?"},
}
_BITS = {"%rs": "u2", "%rd": "u8", "%r": "u4", "%p": "?"}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    **{"eq": np.equal, "ne": np.not_equal, "neu": np.not_equal, "equ": np.equal},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"ltu": np.less, "leu": np.less_equal, "gtu": np.greater, "geu": np.greater_equal},
    **{"num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b)},
}


@dataclass(frozen=True)
class Statement:
    """One instruction. A matrix product is one, with operation "product": d, c, a, b in `registers`."""

    operation: str
    written: tuple[str, ...]
    operands: tuple[str, ...]  # as in the text: registers, numbers, names
    guard: str = ""  # "%p1" or "!%p1"
    target: str = ""  # of a branch
    address: tuple[str, int] | None = None  # of a load or store: register or name, offset

    @property
    def read(self) -> tuple[str, ...]:
        found = [x for x in (*self.operands, self.guard.lstrip("!")) if x.startswith("%") and "." not in x]
        if self.address is not None and self.address[0].startswith("%"):
            found.append(self.address[0])
        return tuple(found)


@dataclass(frozen=True)
class Step:
    """A statement that was executed; for an access to memory, where: a byte address for each lane."""

    index: int
    statement: Statement
    addresses: tuple[int, ...] | None = None


def parse(ptx: str) -> tuple[list[Statement], dict[str, int], list[str]]:
    """(statements, label -> index, names of threadgroup variables) of the only entry of a kernel's code."""
    names = re.findall(r"^\.shared \.align \d+ \.b8 (\S+)\[\d+\];", ptx, re.MULTILINE)
    body = ptx[ptx.index(".entry ") :]
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in body[body.index("\n{\n") + 3 : body.index("\n}", body.index("\n{\n"))].splitlines():
        line = line.strip()
        if "// matrix product" in line:
            statements.append(_product(line))
            continue
        line = line.partition("//")[0].strip()
        if found := re.match(r"([\w$]+):$", line):
            labels[found[1]] = len(statements)
        elif line and line[0] not in ".{}":
            statements += [_statement(part.strip()) for part in line.split(";") if part.strip()]
    return statements, labels, names


def _product(line: str) -> Statement:
    (d0, a0, b0), (d1, a1, b1) = re.findall(r"fma\.rn\.f32 (%\w+), (%\w+), (%\w+), %\w+;", line)
    return Statement("product", (d0, d1), tuple(dict.fromkeys((d0, d1, a0, a1, b0, b1))))


def _statement(text: str) -> Statement:
    guard = ""
    if found := re.match(r"@(!?%\w+)\s+", text):
        guard, text = found[1], text[found.end() :]
    operation, _, rest = text.partition(" " if " " in text and "\t" not in text else "\t")
    operation, rest = text.split(None, 1) if len(text.split(None, 1)) == 2 else (text, "")
    kind = operation.partition(".")[0]
    if kind == "bra":
        return Statement(operation, (), (), guard, rest.strip())
    address = None
    if found := re.search(r"\[([\w%$.]+)(?:\+(-?\d+))?\]", rest):
        address = (found[1], int(found[2] or 0))
        rest = rest.replace(found[0], "", 1)
    groups = [
        tuple(x.strip() for x in (a or b).split(",") if x.strip())
        for a, b in re.findall(r"\{([^}]*)\}|([^,{}]+)", rest)
    ]
    groups = [g for g in groups if g]
    if kind in ("st", "bar", "ret", "red"):
        return Statement(operation, (), tuple(x for g in groups for x in g), guard, "", address)
    written = groups[0]
    if "|" in written[0]:
        written = tuple(written[0].split("|"))
    return Statement(operation, written, tuple(x for g in groups[1:] for x in g), guard, "", address)


class Lanes:
    """The registers of a simdgroup, and how each instruction changes them."""

    def __init__(self, names: list[str], constants: Mapping[int, bytes], arguments: bytes, group: int):
        self.registers: dict[str, np.ndarray] = {}
        self.symbols = {name: _SHARED_APART * i for i, name in enumerate(names)}
        self.constants = constants  # by address
        self.arguments = arguments
        self.special = {"%tid.x": np.arange(LANES, dtype="u4"), "%ctaid.x": np.full(LANES, group, "u4")}

    def value(self, text: str, kind: str) -> np.ndarray:
        """An operand as numbers of a PTX type."""
        dtype = _TYPES[kind]
        if text in self.registers:
            held = self.registers[text]
            wanted = np.dtype(dtype)
            if "b" in (held.dtype.kind, wanted.kind):
                return held
            if held.itemsize > wanted.itemsize:
                held = held.astype(f"u{wanted.itemsize}")
            return held.view(dtype)
        if text in self.special:
            return self.special[text]
        if text in self.symbols:
            return np.full(LANES, self.symbols[text], dtype)
        if text.startswith(("%ctaid", "%clock")):
            return np.zeros(LANES, dtype)
        if text.startswith("0f"):
            return np.full(LANES, int(text[2:], 16), "u4").view(dtype)
        if text.startswith("%"):
            return np.zeros(LANES, dtype)  # never written: undefined in the source too
        number = int(text, 0)
        bits = np.dtype(dtype).itemsize * 8
        if np.dtype(dtype).kind == "f" or number < 0:
            return np.full(LANES, number % (1 << bits), f"u{bits // 8}").view(dtype)
        return np.full(LANES, number % (1 << bits), dtype=f"u{bits // 8}").view(dtype)

    def write(self, name: str, value: np.ndarray) -> None:
        prefix = next(p for p in ("%rs", "%rd", "%r", "%p") if name.startswith(p))
        dtype = np.dtype(_BITS[prefix])
        if dtype.kind == "b":
            self.registers[name] = value.astype(bool)
        else:
            if value.dtype.itemsize != dtype.itemsize:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
            self.registers[name] = np.ascontiguousarray(value).view(dtype)

    def address(self, statement: Statement) -> np.ndarray:
        name, offset = statement.address or ("", 0)
        base = self.value(name, "u64") if name.startswith("%") else np.full(LANES, self.symbols.get(name, 0), "u8")
        return base + np.uint64(offset % (1 << 64))

    def execute(self, s: Statement) -> None:
        """Raises RuntimeError for an instruction that it does not know."""
        try:
            self._execute(s)
        except (KeyError, IndexError) as error:
            raise RuntimeError(f"cannot interpret {s}") from error

    def _execute(self, s: Statement) -> None:
        parts = s.operation.split(".")
        kind, types = parts[0], [p for p in parts[1:] if p in _TYPES]
        with np.errstate(all="ignore"):
            if kind == "ld":
                self._load(s, parts, types[-1])
            elif kind == "mov":
                self._move(s, types[-1])
            elif kind == "cvt":
                self.write(s.written[0], _converted(s, parts, types, self.value))
            elif kind == "setp":
                self._compare(s, parts, types[-1])
            elif kind == "shfl":
                source = self.value(s.operands[1], "u32") & 31
                if parts[2] == "bfly":
                    source = np.arange(LANES) ^ source
                self.write(s.written[0], self.value(s.operands[0], "b32")[source % LANES])
            elif kind == "vote":
                bits = int(sum(1 << i for i, x in enumerate(self.value(s.operands[0], "pred")) if x))
                votes = {
                    "ballot": np.full(LANES, bits, "u4"),
                    "any": np.full(LANES, bits != 0),
                    "all": np.full(LANES, bits == 2**LANES - 1),
                }
                self.write(s.written[0], votes[parts[2]])
            elif kind != "product":
                self.write(s.written[0], self._arithmetic(s, kind, parts, types[-1] if types else "f16x2"))

    def _load(self, s: Statement, parts: list[str], kind: str) -> None:
        size = np.dtype(_TYPES[kind]).itemsize
        for i, register in enumerate(s.written):
            data = b""
            if parts[1] == "param":
                offset = (s.address or ("", 0))[1] + i * size
                data = self.arguments[offset : offset + size]
            elif parts[1] == "const":
                at = int(self.address(s)[0]) + i * size
                base = max((b for b in self.constants if b <= at), default=0)
                data = self.constants.get(base, b"")[at - base : at - base + size]
            number = int.from_bytes(data, "little") if len(data) == size else 0
            self.write(register, np.full(LANES, number, f"u{size}").view(_TYPES[kind]))

    def _move(self, s: Statement, kind: str) -> None:
        size = np.dtype(_TYPES[kind]).itemsize
        if len(s.written) > 1:
            whole = self.value(s.operands[0], kind)
            part = size * 8 // len(s.written)
            for i, register in enumerate(s.written):
                self.write(register, (whole >> np.array(i * part, whole.dtype)).astype(f"u{part // 8}"))
        elif len(s.operands) > 1:
            part = size * 8 // len(s.operands)
            whole = np.zeros(LANES, f"u{size}")
            for i, register in enumerate(s.operands):
                whole |= self.value(register, f"b{part}").astype(whole.dtype) << np.array(i * part, whole.dtype)
            self.write(s.written[0], whole)
        else:
            self.write(s.written[0], self.value(s.operands[0], kind))

    def _compare(self, s: Statement, parts: list[str], kind: str) -> None:
        compared = _COMPARE[parts[1]](self.value(s.operands[0], kind), self.value(s.operands[1], kind))
        if len(s.operands) > 2:
            other = self.value(s.operands[2].lstrip("!"), "pred") ^ s.operands[2].startswith("!")
            compared = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]](compared, other)
        self.write(s.written[0], compared)

    def _arithmetic(self, s: Statement, kind: str, parts: list[str], t: str) -> np.ndarray:
        if kind == "selp":
            return np.where(
                self.value(s.operands[2], "pred"), self.value(s.operands[0], t), self.value(s.operands[1], t)
            )
        if t == "f16x2":  # of two halves or two bfloats: data, which is 0
            return np.zeros(LANES, "u4")
        if kind in ("mul", "mad") and "wide" in parts:
            double = f"{_TYPES[t][0]}{2 * int(_TYPES[t][1:])}"
            product = self.value(s.operands[0], t).astype(double) * self.value(s.operands[1], t).astype(double)
            return product + self.value(s.operands[2], f"{t[0]}{2 * int(t[1:])}") if kind == "mad" else product
        if kind in ("shl", "shr"):
            shifted = self.value(s.operands[0], t)
            amount = self.value(s.operands[1], "u32").astype(shifted.dtype)
            return shifted << amount if kind == "shl" else shifted >> amount
        x = [self.value(o, t) for o in s.operands]
        if kind == "bfe":
            return (x[0] >> x[1]) & ((np.array(1, x[0].dtype) << x[2]) - np.array(1, x[0].dtype))
        if kind == "mul" and "hi" in parts:
            return ((x[0].astype(object) * x[1].astype(object)) >> (8 * x[0].itemsize)).astype(x[0].dtype)
        if t[0] == "f" and t != "f64":
            x = [v.astype("f4") for v in x]
        return _FUNCTIONS[kind](*x).astype(_TYPES[t])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    return np.where(b == 0, 0, a // np.where(b == 0, 1, b)).astype(a.dtype)


_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda a, b, c: a * b + c},
    **{"fma": lambda a, b, c: a * b + c, "div": _divide, "rem": lambda a, b: a - _divide(a, b) * b},
    **{"min": np.fmin, "max": np.fmax, "abs": np.abs, "neg": np.negative, "not": np.invert},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "ex2": np.exp2, "lg2": np.log2},
    **{"rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a)},
}


def _converted(s: Statement, parts: list[str], types: list[str], value) -> np.ndarray:
    if "f16x2" in parts or "bf16x2" in parts:
        high, low = (value(o, "f32").astype("f2").view("u2").astype("u4") for o in s.operands)
        return (high << np.uint32(16)) | low
    if parts[-1] == "bf16":
        return value(s.operands[0], "b16").astype("u4") << np.uint32(16)
    if "bf16" in parts:
        return (value(s.operands[0], "f32").view("u4") >> np.uint32(16)).astype("u2")
    to, source = types[0], value(s.operands[0], types[1])
    if to == "f32" and types[1] == "f16":
        return source.astype("f4")
    return source.astype(_TYPES[to])


def run(
    ptx: str,
    buffers: Mapping[int, bytes | None],
    grid: tuple[int, int, int],
    group: tuple[int, int, int],
    position: int = 0,
    most: int = 200_000,
) -> list[Step]:
    """The steps of simdgroup 0 of threadgroup (position, 0, 0).

    buffers: by index, what a constant one holds, or None for device memory. grid and group are in threads. Raises
    RuntimeError after `most` steps.
    """
    statements, labels, names = parse(ptx)
    addresses = {i: (i + 1) << 40 for i in buffers}
    constants = {addresses[i]: data for i, data in buffers.items() if data is not None}
    block = np.zeros(_ARGUMENTS, "u8")
    for i, at in addresses.items():
        block[i] = at
    lanes = Lanes(names, constants, block.tobytes() + np.array([*grid, *group], "u4").tobytes(), position)
    steps: list[Step] = []
    at = 0
    while at < len(statements):
        s = statements[at]
        taken = True
        if s.guard:
            votes = lanes.value(s.guard.lstrip("!"), "pred") ^ s.guard.startswith("!")
            taken = bool(np.count_nonzero(votes) * 2 > LANES)
        where = None
        if s.address is not None and not s.operation.startswith("ld.param"):
            where = tuple(int(x) for x in lanes.address(s))
        steps.append(Step(at, s, where))
        if len(steps) > most:
            raise RuntimeError(f"no end after {most} instructions")
        at += 1
        kind = s.operation.partition(".")[0]
        if not taken:
            continue
        if kind == "ret":
            break
        if kind == "bra":
            at = labels[s.target]
        elif kind not in ("st", "bar", "membar", "fence", "red"):
            lanes.execute(s)
    return steps


def iterations(steps: list[Step]) -> list[list[Step]]:
    """The rounds of the main loop: the outermost one with matrix products in every round, at least three times."""
    visits: dict[int, list[int]] = {0: [0]}
    for position, (step, after) in enumerate(pairwise(steps), 1):
        if after.index != step.index + 1 or step.statement.target:
            visits.setdefault(after.index, []).append(position)
    best: list[list[Step]] = []
    for places in visits.values():
        rounds = [steps[a:b] for a, b in pairwise(places)]
        is_main = len(rounds) >= 3 and all(any(s.statement.operation == "product" for s in r) for r in rounds)
        if is_main and (not best or len(rounds[1]) > len(best[1])):
            best = rounds
    if not best:
        raise RuntimeError("the kernel has no loop with matrix products that runs three times")
    return best
