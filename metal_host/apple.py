"""How many registers a kernel needs on an Apple GPU, counted in its code.

Apple's allocator cannot be asked here. What can be counted are the values that are alive together, once the code has the
operands of Apple's GPUs:

* a matrix product takes its operands as they are, two elements a lane (eight of a cooperative tensor's 16x16 fragment), and
  adds in place; on NVIDIA's tensor cores every fragment of 8x8 takes twice the registers (include/msl/nvptx.h,
  `__MH_APPLE`);
* the kernel and its functions are inlined into one, so that no register is held for a call;
* what is loaded from constant memory, and computed from that alone, lies in uniform registers, which no lane pays for. They
  are filled once for a launch: what depends on the threadgroup's position is computed by its lanes;
* a half takes half a register, a constant none, nor does a special register, which is read where it is needed.

Instructions are counted in the compiler's order; or, in blocks where that needs fewer registers, where one that makes more
than it uses up waits until its result is needed: so do compilers that run short of registers. Nothing is moved across a barrier or into a loop. A kernel that counts
more than 128 can hardly exist on Apple's GPUs without spilling; what Apple's compiler makes of one that counts less was
never seen.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from . import nvidia
from .frontend import Unit

_FLAGS = ("-D__MH_APPLE", "-mllvm", "-inline-threshold=10000000", "-mllvm", "-disable-lsr")
_REGISTER = re.compile(r"%(?:rs|rd|r|p)\d+")
_SPECIAL = re.compile(r"%(?:tid|ctaid|ntid|nctaid|laneid|warpid)\b")
_WEIGHTS = {"%rs": 0.5, "%rd": 2.0, "%r": 1.0, "%p": 0.0}
_UNIFORM_VALUES = 192  # at most: Apple's GPUs have 256 uniform registers
_WIDENING = {"cvt.u64.u32", "cvt.s64.s32"}
_MOST_SHIFT, _NO_SHIFT = 4, 99  # of an operand
_VARYING = {"ld", "product", "special", "shfl", "vote", "activemask", "atom", "call"}  # whatever they read
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
    shift: int = _NO_SHIFT  # bits by which it shifts to the left, where that is a constant


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
    if kind == "mov" and _SPECIAL.search(operands):
        operation = kind = "special"
    written: list[str] = []
    if kind not in ("st", "bra", "bar", "ret", "red"):
        destination = operands.strip()
        destination = (
            destination[: destination.index("}")] if destination.startswith("{") else destination.partition(",")[0]
        )
        written = _REGISTER.findall(destination)
        operands = operands.replace(destination, "", 1)
    read = _REGISTER.findall(operands) + _REGISTER.findall(guard) + (written if guard else [])
    blocks[-1].instructions.append(
        _Instruction(operation, tuple(written), tuple(dict.fromkeys(read)), _shift(operation, operands))
    )
    if kind in ("bra", "ret"):
        blocks[-1].target = operands.strip() if kind == "bra" else ""
        blocks[-1].goes_on = bool(guard)
        blocks.append(_Block())


def _shift(operation: str, operands: str) -> int:
    last = operands.rpartition(",")[2].strip()
    if not last.isdigit() or not operation.startswith(("shl", "mul.wide")):
        return _NO_SHIFT
    factor = int(last)
    if operation.startswith("shl"):
        return factor
    return factor.bit_length() - 1 if factor & (factor - 1) == 0 else _NO_SHIFT


def _free(blocks: list[_Block]) -> set[str]:
    """Registers that no lane pays for: uniform values, constants and special registers."""
    definitions: dict[str, list[_Instruction]] = {}
    for block in blocks:
        for instruction in block.instructions:
            for register in instruction.written:
                definitions.setdefault(register, []).append(instruction)
    uniform: set[str] = set()
    computed = 0
    while True:
        before = len(uniform)
        for register, places in definitions.items():
            if register in uniform or len(places) > 1:
                continue
            kind, _, space = places[0].operation.partition(".")
            read = places[0].read
            is_constant = kind == "mov" and not read
            if is_constant or (kind == "ld" and space.startswith(("param", "const")) and uniform.issuperset(read)):
                uniform.add(register)
            elif kind not in _VARYING and read and uniform.issuperset(read) and computed < _UNIFORM_VALUES:
                uniform.add(register)
                computed += 1
        if len(uniform) == before:
            special = {r for r, places in definitions.items() if {p.operation for p in places} == {"special"}}
            # Widened ones too.
            special |= {
                r for r, (p, *_) in definitions.items() if p.operation in _WIDENING and special.issuperset(p.read)
            }
            return uniform | special


def _operands(blocks: list[_Block], free: set[str]) -> None:
    """Takes out registers for which an Apple GPU needs no place, or half of it.

    Accesses have a base and an offset: what is another register plus what is free is added where it is used. Operands of
    64 bits may be given as 32, and shifted by up to 4 bits, in additions and offsets: what is a widened register, and
    shifted so, is read as that register (dougallj/applegpu). Addresses in threadgroup memory have 32 bits. A lane that is
    another's number with some bits turned over (simd_shuffle_xor) is part of the instruction.
    """
    all_instructions = [i for block in blocks for i in block.instructions]
    definitions: dict[str, list[_Instruction]] = {}
    readers: dict[str, set[str]] = {}
    for instruction in all_instructions:
        for register in instruction.written:
            definitions.setdefault(register, []).append(instruction)
        for register in instruction.read:
            readers.setdefault(register, set()).add(".".join(instruction.operation.split(".")[:2]))
    instead: dict[str, str] = {}
    widened: set[str] = set()
    for instruction in all_instructions:
        others = [r for r in instruction.read if r not in free]
        if len(others) != 1 or len(instruction.written) != 1 or len(definitions[instruction.written[0]]) != 1:
            continue
        (register,) = instruction.written
        if instruction.operation in _WIDENING or (
            instruction.shift <= _MOST_SHIFT and (instruction.operation.startswith("mul.wide") or others[0] in widened)
        ):
            widened.add(register)
            instead[register] = others[0]
        elif instruction.operation == "add.s64":
            instead[register] = others[0]
    instead |= {
        register: f"%r{register}"  # of 32 bits
        for register, by in readers.items()
        if register.startswith("%rd") and register not in instead and by <= {"ld.shared", "st.shared"}
    }

    def of(register: str) -> str:
        while register in instead:
            register = instead[register]
        return register

    def turned(register: str) -> bool:
        return all(d.operation == "xor.b32" and len(d.read) == 1 for d in definitions.get(register, ()))

    for block in blocks:
        kept = (
            i for i in block.instructions if not (i.written and i.written[0] in instead) or "%r%" in of(i.written[0])
        )
        block.instructions = [
            replace(
                i,
                written=tuple(map(of, i.written)),
                read=tuple(dict.fromkeys(of(r) for r in i.read if not (i.operation.startswith("shfl") and turned(r)))),
            )
            for i in kept
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


def _most_alive(instructions: list[_Instruction], live_out: set[str], free: set[str]) -> float:
    """Within a block, in this order."""
    live, weight = live_out, sum(map(_weight, live_out))
    most = weight
    for instruction in reversed(instructions):
        before = (live - set(instruction.written)) | (set(instruction.read) - free)
        # What is written and never read needs a place too, and so does a result beside operands that live on.
        most = max(most, weight + sum(_weight(r) for r in instruction.written if r not in live))
        weight += sum(map(_weight, before - live)) - sum(map(_weight, live - before))
        live = before
    return max(most, weight)


def live_registers(ptx: str) -> int:
    """The most registers of 32 bits that are alive together, as a multiple of 4; see the module."""
    blocks = _blocks(ptx)
    free, successors = _free(blocks), _successors(blocks)
    _operands(blocks, free)
    live_in = _live_in(blocks, successors, free)
    most = 0.0
    for block, following in zip(blocks, successors, strict=True):
        live_out = set().union(*(live_in[i] for i in following))
        orders = (block.instructions, _later(block.instructions, live_out, free))
        most = max(most, min(_most_alive(order, live_out, free) for order in orders))
    return math.ceil(most / 4) * 4
