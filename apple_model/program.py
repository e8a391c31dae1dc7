"""A trace as a program for the simulator of a core: what an instruction costs on an Apple GPU, and what waits for what.

Costs are issue cycles of a scheduler (philipturner/metal-benchmarks, dougallj/applegpu). Free are: reading and writing
halves of registers as 16-bit operands, so conversions between half and float and the taking apart of a pair; adding the
base and the index of an address; comparing for a selection.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from .trace import Step, iterations

_ALU = {
    **dict.fromkeys(
        ("add", "sub", "mul", "fma", "mad", "max", "min", "and", "or", "xor", "not", "neg", "abs", "selp"), 1
    ),
    **{"setp": 0, "bra": 0, "bar": 0, "cvt": 0, "mov": 0, "ret": 0, "membar": 0, "fence": 0},
    **{
        "shl": 1,
        "shr": 4,
        "bfe": 2,
        "bfi": 2,
        "prmt": 2,
        "rcp": 6,
        "div": 10,
        "rem": 14,
        "sqrt": 8,
        "rsqrt": 8,
        "copysign": 1,
    },
}
_TRANSCENDENTALS = {"ex2", "lg2", "sin", "cos", "tanh"}
_PAIRING = 2  # moves that bring two halves into one register: neither lies where it should
_BANK_BYTES = 4
_WIDEST = 16  # bytes of a lane in one access


@dataclass(frozen=True)
class Operation:
    """What a simdgroup issues: kind is one of "alu", "exp", "shuffle", "product", "load", "store", "barrier", "copy".

    amount: cycles or instructions. space, bytes: of an access by all 32 lanes; addresses: of its lanes. waits: numbers
    of the loads and products that must have ended; number: its own.
    """

    kind: str
    amount: int = 0
    space: str = ""
    bytes: int = 0
    addresses: tuple[int, ...] = ()
    waits: tuple[int, ...] = ()
    number: int = -1


@dataclass
class Program:
    """One round of a kernel's main loop for one simdgroup."""

    operations: list[Operation]
    products: int
    float_operands: bool
    rescaling: int  # cycles of a round in which a maximum has grown, beyond those of another
    outside: int  # instructions before and after the loop
    counts: Counter[str] = field(default_factory=Counter)


def program_of(steps: list[Step], ahead: int) -> Program:
    """ahead: products that a load may be issued before its place in the code, as a compiler's scheduler moves it."""
    rounds = iterations(steps)
    steady, first = rounds[len(rounds) // 2], rounds[0]
    operations = _merged(_moved(_operations(steady), ahead))
    costs = [sum(_cost(s, _readers(r)) for s in r) for r in (first, steady)]
    done = [s for r in rounds for s in r]
    products = [s.statement for s in steady if s.statement.operation == "product"]
    return Program(
        operations,
        len(products),
        max(len(p.operands) for p in products) > 4,
        max(0, costs[0] - costs[1]),
        len(steps) - len(done),
        _counts(operations),
    )


def _counts(operations: list[Operation]) -> Counter[str]:
    """Instructions by class, and bytes."""
    counts: Counter[str] = Counter()
    for o in operations:
        if o.kind in ("load", "store"):
            counts[f"{o.space} {o.kind}s"] += 1
            counts[f"{o.space} {o.kind} bytes"] += o.bytes
        else:
            counts["alu cycles" if o.kind == "alu" else f"{o.kind}s"] += o.amount
    return counts


def _class(step: Step) -> tuple[str, str, int]:
    """(kind of operation, memory space, bytes of all lanes)."""
    s = step.statement
    parts = s.operation.split(".")
    if parts[0] in ("ld", "st") and parts[1] in ("global", "shared"):
        width = int(parts[-1][1:]) // 8 * (len(s.written) if parts[0] == "ld" else len(s.operands))
        return "load" if parts[0] == "ld" else "store", "device" if parts[1] == "global" else "threadgroup", 32 * width
    kinds = {"product": "product", "shfl": "shuffle", "vote": "shuffle"}
    if parts[0] == "bar" and "warp" not in parts:  # a simdgroup's lanes run together: its barrier costs nothing
        return "barrier", "", 0
    if parts[0] in kinds:
        return kinds[parts[0]], "", 0
    return ("exp", "", 0) if parts[0] in _TRANSCENDENTALS else ("alu", "", 0)


def _readers(steps: list[Step]) -> dict[str, set[str]]:
    """What reads each register: operations, "address" for the base of an access."""
    readers: dict[str, set[str]] = {}
    for step in steps:
        s = step.statement
        for register in s.operands:
            readers.setdefault(register, set()).add(s.operation)
        if s.address is not None:
            readers.setdefault(s.address[0], set()).add("address")
    return readers


def _cost(step: Step, readers: dict[str, set[str]]) -> int:
    """Issue cycles of an instruction of kind "alu"; 0 of others."""
    s = step.statement
    if _class(step)[0] != "alu":
        return 0
    kind, _, types = s.operation.partition(".")
    if kind == "ld":  # from constant memory, inside the loop: a uniform register
        return 0
    if kind == "mov":
        if len(s.operands) > 1:
            return _PAIRING
        return 1 if s.operands and not s.operands[0].startswith("%") and len(s.written) == 1 else 0
    if kind == "cvt":
        return 0 if "f16" in types or "bf16" in types or "64" in types else 1
    wide = "64" in types or "wide" in types
    used_by = set().union(*(readers.get(r, set()) for r in s.written)) if s.written else set()
    if wide and kind in ("add", "shl") and used_by <= {"address", "add.s64", "shl.b64"}:
        return 0 if used_by <= {"address"} or kind == "shl" else 2
    if kind in ("mul", "mad"):
        is_float = types.endswith("f32") or types.endswith("f16")
        return 1 if is_float else 8 if "64" in types else 4
    return (2 if wide else 1) * _ALU[kind]


def _operations(steps: list[Step]) -> list[Operation]:
    readers = _readers(steps)
    pending: dict[str, int] = {}  # the load or product that a register comes from
    result = _Joining()
    for step in steps:
        s = step.statement
        kind, space, size = _class(step)
        waits = tuple(dict.fromkeys(pending[r] for r in s.read if r in pending))
        if kind == "alu" and s.operation.startswith(("mov", "cvt")) and not _cost(step, readers):
            # No instruction: what it names is still on its way.
            for register in s.written:
                pending.pop(register, None)
                if waits:
                    pending[register] = max(waits)
            continue
        amount = _cost(step, readers) if kind == "alu" else 1
        number = result.add(Operation(kind, amount, space, size, step.addresses or (), waits))
        for register in s.written:
            pending.pop(register, None)
            if kind in ("load", "product"):
                pending[register] = number
    return result.finished()


class _Joining:
    """Operations in order. Accesses become one if each lane's elements are neighbours: compilers make vectors of them.

    Loads go to the place of the first, stores to that of the last; not past a barrier, nor loads past stores to the
    same memory.
    """

    def __init__(self) -> None:
        self.operations: list[Operation | None] = []
        self.alias: dict[int, int] = {}  # numbers of what was joined
        self.open: dict[tuple[str, str], list[int]] = {}

    def add(self, operation: Operation) -> int:
        operation = replace(operation, number=len(self.operations))
        self.operations.append(operation)
        if operation.kind == "barrier":
            self.open.clear()
        if operation.kind not in ("load", "store"):
            return operation.number
        self.open.pop(("store" if operation.kind == "load" else "load", operation.space), None)
        among = self.open.setdefault((operation.kind, operation.space), [])
        at = operation.number
        while (found := self._neighbour(among, at)) is not None:
            first, last = sorted((found, at))
            kept, dropped = (first, last) if operation.kind == "load" else (last, first)
            joined = _joined(self.operations[kept], self.operations[dropped])
            assert joined is not None
            self.operations[kept], self.operations[dropped] = joined, None
            self.alias[dropped] = at = kept
            if found in among:
                among.remove(found)
        among.append(at)
        return at

    def _neighbour(self, among: list[int], at: int) -> int | None:
        tried = (other for other in among if other != at)
        return next((o for o in tried if _joined(self.operations[o], self.operations[at]) is not None), None)

    def finished(self) -> list[Operation]:
        def name(number: int) -> int:
            while number in self.alias:
                number = self.alias[number]
            return number

        # A load that was moved forward does not wait for what its later parts' addresses came from.
        return [
            replace(o, waits=tuple(dict.fromkeys(w for w in map(name, o.waits) if w < o.number)))
            for o in self.operations
            if o is not None
        ]


def _joined(one: Operation | None, other: Operation | None) -> Operation | None:
    """`one` with the elements of `other`, if they are neighbours in every lane."""
    if one is None or other is None or one.bytes + other.bytes > 32 * _WIDEST:
        return None
    before, after = one.bytes // 32, other.bytes // 32
    apart = other.addresses[0] - one.addresses[0]
    if apart not in (before, -after) or any(
        b - a != apart for a, b in zip(one.addresses, other.addresses, strict=True)
    ):
        return None
    first = one if apart > 0 else other
    return replace(
        one, bytes=one.bytes + other.bytes, addresses=first.addresses, waits=tuple({*one.waits, *other.waits})
    )


def _moved(operations: list[Operation], ahead: int) -> list[Operation]:
    """Loads earlier, past at most `ahead` products, never past a barrier, a store or what their address comes from."""
    result: list[Operation] = []
    for operation in operations:
        at = len(result)
        if operation.kind == "load":
            passed = 0
            while at and passed <= ahead:
                before = result[at - 1]
                if before.kind in ("barrier", "store", "load") or before.number in operation.waits:
                    break
                passed += before.kind == "product"
                if passed > ahead:
                    break
                at -= 1
        result.insert(at, operation)
    return result


def _merged(operations: list[Operation]) -> list[Operation]:
    """Neighbouring instructions of one kind that wait for nothing new as one; those that cost nothing only wait."""
    result: list[Operation] = []
    known: set[int] = set()
    for operation in operations:
        waits = tuple(w for w in operation.waits if w not in known or operation.kind == "product")
        if operation.kind in ("alu", "exp", "shuffle"):
            known.update(waits)
            if operation.kind == "alu" and not operation.amount and not waits:
                continue
            last = result[-1] if result else None
            if last is not None and last.kind == operation.kind and not waits and operation.kind != "shuffle":
                result[-1] = Operation(last.kind, last.amount + operation.amount, waits=last.waits)
                continue
        result.append(
            Operation(
                operation.kind,
                operation.amount,
                operation.space,
                operation.bytes,
                operation.addresses,
                waits,
                operation.number,
            )
        )
    return result


def lines(addresses: tuple[int, ...], bytes_a_lane: int) -> int:
    """Cache lines of 128 bytes that an access touches."""
    return len({(a + o) // 128 for a in addresses for o in (0, bytes_a_lane - 1)})


def bank_cycles(addresses: tuple[int, ...], bytes_a_lane: int, width: int) -> int:
    """Cycles of an access to threadgroup memory of `width` bytes a cycle: words of the fullest bank."""
    banks = width // _BANK_BYTES
    words = {(a + o) // _BANK_BYTES for a in addresses for o in range(0, bytes_a_lane, _BANK_BYTES)}
    return max(Counter(word % banks for word in words).values())
