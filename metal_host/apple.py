"""How many registers a kernel needs on an Apple GPU, counted in its code.

Apple's allocator cannot be asked here. What can be counted are the values that are alive together, once the code has the
operands of Apple's GPUs:

* a matrix product takes its operands as they are, two elements a lane, and adds in place; on NVIDIA's tensor cores every
  fragment takes twice the registers (include/msl/nvptx.h, `__MH_APPLE`);
* the kernel and its functions are inlined into one, so that no register is held for a call;
* what is loaded from constant memory, and computed from that alone, lies in uniform registers, which no lane pays for;
* a half takes half a register, a constant none.

Instructions are counted in the compiler's order, but where one makes more than it uses up, it waits until its result is
needed: so do compilers that run short of registers. Nothing is moved across a barrier or into a loop. A kernel that counts
more than 128 can hardly exist on Apple's GPUs without spilling; what Apple's compiler makes of one that counts less was
never seen.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from . import nvidia
from .frontend import Unit

_FLAGS = ("-D__MH_APPLE", "-mllvm", "-inline-threshold=10000000", "-mllvm", "-disable-lsr")
_REGISTER = re.compile(r"%(?:rs|rd|r|p)\d+")
_WEIGHTS = {"%rs": 0.5, "%rd": 2.0, "%r": 1.0, "%p": 0.0}
_UNIFORM_VALUES = 192  # at most: Apple's GPUs have 256 uniform registers
_UNIFORM_OPERATIONS = {
    *("add", "sub", "mul", "mad", "shl", "shr", "and", "or", "xor", "cvt", "neg", "min", "max", "mov", "div", "abs")
}
_STAYS = {"bar", "bra", "ret", "st", "red", "atom", "membar", "fence", "shfl", "vote", "activemask", "call"}  # in place


def compile_ptx(unit: Unit, name: str) -> str:
    """The kernel `name` alone, inlined, as the only entry."""
    ptx, entries = nvidia.compile_ptx(unit, [name], _FLAGS)
    return _only(ptx, entries[name])


def _only(ptx: str, entry: str) -> str:
    """The implementation that `entry` calls becomes the entry; functions that nobody calls any more go."""
    implementation = f"__clang_ocl_kern_imp_{entry}"
    definitions = re.compile(
        r"^\.(?:visible |weak )*(?:func|entry)\b(?:[^;{]|\n)*?(\w+)\([^;{]*\n\{\n.*?^\}\n", re.M | re.S
    )
    found = {m[1]: m[0] for m in definitions.finditer(ptx)}
    body = found[implementation]
    calls = re.search(r"\bcall\b", body) is not None
    kept = "".join(text for name, text in found.items() if calls and name not in (entry, implementation))
    header = re.sub(rf"^\.func {implementation}\n\([^)]*\)\n;\n", "", definitions.sub("", ptx), flags=re.M)
    body = body.replace(f".func {implementation}(", f".entry {implementation}(", 1)
    return header + kept + body


@dataclass
class _Instruction:
    operation: str
    written: tuple[str, ...]
    read: tuple[str, ...]


@dataclass
class _Block:
    label: str = ""
    instructions: list[_Instruction] = field(default_factory=list)
    target: str = ""  # of a branch at the end
    goes_on: bool = True  # to the next block


def _blocks(ptx: str) -> list[_Block]:
    body = ptx[ptx.index(".entry ") :]
    begin = body.index("\n{\n") + 3
    blocks = [_Block()]
    for line in body[begin : body.index("\n}", begin)].splitlines():
        text = line.partition("//")[0].strip()
        if found := re.match(r"([\w$]+):$", text):
            blocks.append(_Block(found[1]))
        elif text and text[0] not in ".{}":
            if "matrix product" in line:
                registers = tuple(dict.fromkeys(_REGISTER.findall(text)))
                written = tuple(re.findall(r"fma\.rn\.f32 (%\w+),", text))
                blocks[-1].instructions.append(_Instruction("product", written, registers))
                continue
            for statement in filter(None, (part.strip() for part in text.split(";"))):
                _add(blocks, statement)
    return blocks


def _add(blocks: list[_Block], statement: str) -> None:
    guard, _, rest = statement.partition(" ") if statement.startswith("@") else ("", "", statement)
    operation, _, operands = rest.strip().replace("\t", " ").partition(" ")
    kind = operation.partition(".")[0]
    written: list[str] = []
    if kind not in ("st", "bra", "bar", "ret", "red"):
        destination = operands.strip()
        destination = (
            destination[: destination.index("}")] if destination.startswith("{") else destination.partition(",")[0]
        )
        written = _REGISTER.findall(destination)
        operands = operands.replace(destination, "", 1)
    read = _REGISTER.findall(operands) + _REGISTER.findall(guard) + (written if guard else [])
    blocks[-1].instructions.append(_Instruction(operation, tuple(written), tuple(dict.fromkeys(read))))
    if kind in ("bra", "ret"):
        blocks[-1].target = operands.strip() if kind == "bra" else ""
        blocks[-1].goes_on = bool(guard)
        blocks.append(_Block())


def _free(blocks: list[_Block]) -> set[str]:
    """Registers that no lane pays for: uniform values, and constants."""
    definitions: dict[str, list[_Instruction]] = {}
    for block in blocks:
        for instruction in block.instructions:
            for register in instruction.written:
                definitions.setdefault(register, []).append(instruction)
    free: set[str] = set()
    computed = 0
    while True:
        before = len(free)
        for register, places in definitions.items():
            if register in free or len(places) > 1:
                continue
            kind, _, space = places[0].operation.partition(".")
            read = places[0].read
            is_constant = kind == "mov" and not read
            if is_constant or (kind == "ld" and space.startswith(("param", "const")) and free.issuperset(read)):
                free.add(register)
            elif kind in _UNIFORM_OPERATIONS and read and free.issuperset(read) and computed < _UNIFORM_VALUES:
                free.add(register)
                computed += 1
        if len(free) == before:
            return free


def _addressed_by_base(blocks: list[_Block], free: set[str]) -> None:
    """A register that is another plus what is free is added where it is used: accesses have a base and an offset."""
    count: dict[str, int] = {}
    for block in blocks:
        for instruction in block.instructions:
            for register in instruction.written:
                count[register] = count.get(register, 0) + 1
    base: dict[str, str] = {}
    for block in blocks:
        for instruction in block.instructions:
            others = [r for r in instruction.read if r not in free]
            if instruction.operation == "add.s64" and len(others) == 1 and count[instruction.written[0]] == 1:
                base[instruction.written[0]] = others[0]

    def of(register: str) -> str:
        while register in base:
            register = base[register]
        return register

    for block in blocks:
        block.instructions = [
            _Instruction(i.operation, i.written, tuple(dict.fromkeys(map(of, i.read))))
            for i in block.instructions
            if not (i.written and i.written[0] in base)
        ]


def _weight(register: str) -> float:
    return next(weight for prefix, weight in _WEIGHTS.items() if register.startswith(prefix))


def _successors(blocks: list[_Block]) -> list[list[int]]:
    labels = {block.label: i for i, block in enumerate(blocks) if block.label}
    return [
        [labels[t] for t in (block.target,) if t] + [i + 1] * (block.goes_on and i + 1 < len(blocks))
        for i, block in enumerate(blocks)
    ]


def _live_in(blocks: list[_Block], successors: list[list[int]], free: set[str]) -> list[set[str]]:
    used, set_here = [], []
    for block in blocks:
        uses: set[str] = set()
        sets: set[str] = set()
        for instruction in block.instructions:
            uses |= set(instruction.read) - sets - free
            sets |= set(instruction.written)
        used.append(uses)
        set_here.append(sets)
    live: list[set[str]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(blocks))):
            now = used[i] | (set().union(*(live[j] for j in successors[i])) - set_here[i])
            changed, live[i] = changed or now != live[i], now
    return live


def _later(instructions: list[_Instruction], live_out: set[str], free: set[str]) -> list[_Instruction]:
    """The instructions of a block, each as late as its result is needed where that saves registers."""
    order: list[_Instruction] = []
    waiting: dict[str, _Instruction] = {}  # by what they write
    last_use = {register: n for n, instruction in enumerate(instructions) for register in instruction.read}

    def issue(instruction: _Instruction) -> None:
        for register in instruction.written:
            waiting.pop(register, None)
        for register in instruction.read:
            if register in waiting:
                issue(waiting[register])
        order.append(instruction)

    for n, instruction in enumerate(instructions):
        kind = instruction.operation.partition(".")[0]
        ends = sum(_weight(r) for r in instruction.read if last_use[r] == n and r not in live_out and r not in free)
        makes = sum(_weight(r) for r in instruction.written)
        written = set(instruction.written)
        for other in list({id(w): w for w in waiting.values()}.values()):
            if written & {*other.read, *other.written} and other.written[0] in waiting:
                issue(other)  # before what it reads is overwritten
            elif kind in _STAYS and other.operation.startswith("ld") and other.written[0] in waiting:
                issue(other)
        if kind in _STAYS or kind == "product" or makes <= ends or not written:
            issue(instruction)
        else:
            waiting.update(dict.fromkeys(instruction.written, instruction))
    for other in list({id(w): w for w in waiting.values()}.values()):
        if other.written[0] in waiting:
            issue(other)
    return order


def live_registers(ptx: str) -> int:
    """The most registers of 32 bits that are alive together, as a multiple of 4; see the module."""
    blocks = _blocks(ptx)
    free, successors = _free(blocks), _successors(blocks)
    _addressed_by_base(blocks, free)
    live_in = _live_in(blocks, successors, free)
    most = 0.0
    for block, following in zip(blocks, successors, strict=True):
        live = set().union(*(live_in[i] for i in following))
        weight = sum(map(_weight, live))
        for instruction in reversed(_later(block.instructions, live, free)):
            before = (live - set(instruction.written)) | (set(instruction.read) - free)
            # What is written and never read needs a place too, and so does a result beside operands that live on.
            most = max(most, weight + sum(_weight(r) for r in instruction.written if r not in live))
            weight += sum(map(_weight, before - live)) - sum(map(_weight, live - before))
            live = before
        most = max(most, weight)
    return math.ceil(most / 4) * 4
