"""How many registers a kernel's live values need on an Apple GPU, as ptxas counts them.

Apple's allocator cannot be asked here. ptxas can be asked for the fewest registers with which nothing is spilled, once
the code that it sees has the operands of Apple's GPUs:

* a matrix product takes its operands as they are, two elements a lane, and adds in place; on NVIDIA's tensor cores every
  fragment takes twice the registers (include/msl/nvptx.h, `__MH_APPLE`);
* the kernel and its functions are inlined into the entry, so that no register is held for a call;
* what is loaded from constant memory, and computed from that alone, lies in uniform registers on Apple's GPUs, which no
  lane pays for. The counterpart is a kernel's parameters, which NVIDIA's instructions take as operands: each `constant`
  buffer, and each such value, becomes a parameter.

The result is what a good allocator with a free hand in the order of instructions needs. It compares shapes; a shape above
128 can hardly exist on Apple's GPUs without spilling.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import abi, nvidia, toolchain
from . import cache as disk
from .frontend import Unit

ENTRY = "__mh_counted"
_FLAGS = ("-D__MH_APPLE", "-mllvm", "-inline-threshold=10000000")
_THREADS = 128  # of a group: few enough for ptxas to allow 255 registers
_UNIFORM_BYTES = 512  # of each constant buffer, as parameters
_UNIFORM_VALUES = 192  # of those computed from them: Apple's GPUs have 256 uniform registers
_SET = re.compile(r"^\t(\w[\w.]*)\s+(%(?:rs|rd|r)\d+), ([^;\[{]*);$", re.MULTILINE)
_UNIFORM_OPERATIONS = {
    "add",
    "sub",
    "mul",
    "mad",
    "shl",
    "shr",
    "and",
    "or",
    "xor",
    "cvt",
    "neg",
    "min",
    "max",
    "mov",
    "div",
    "abs",
}
_ARGUMENT = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+?_param_0(?:\+(\d+))?\];")
_CONSTANT_LOAD = re.compile(r"\bld\.const(\S*\s+(?:\{[^}]*\}|%\w+)), \[(%rd\d+)(?:\+(\d+))?\];")


def compile_ptx(unit: Unit, name: str) -> str:
    """The kernel `name` alone, inlined, as the entry `ENTRY`."""
    ptx, entries = nvidia.compile_ptx(unit, [name], _FLAGS)
    return _uniform(_only(ptx, entries[name]))


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
    body = body.replace(f".func {implementation}(", f".entry {ENTRY}(", 1)
    return header + kept + body


def _uniform(ptx: str) -> str:
    """Loads from the beginning of a constant buffer become parameters of the kernel."""
    buffers = {register: int(offset or 0) // 8 for register, offset in _ARGUMENT.findall(ptx)}

    def parameter(load: re.Match[str]) -> str:
        what, register, at = load[1], load[2], int(load[3] or 0)
        if buffers.get(register, abi.MAX_BUFFERS) >= abi.MAX_BUFFERS or at + 16 > _UNIFORM_BYTES:
            return load[0]
        return f"ld.param{what}, [uniform+{buffers[register] * _UNIFORM_BYTES + at}];"

    ptx, values = _uniform_values(_CONSTANT_LOAD.sub(parameter, ptx))
    size = abi.MAX_BUFFERS * _UNIFORM_BYTES + 8 * values
    uniform = f",\n\t.param .align 16 .b8 uniform[{size}]\n)"
    return re.sub(rf"(\.entry {ENTRY}\([^)]*?)\n\)", lambda m: m[1] + uniform, ptx, count=1)


def _uniform_values(ptx: str) -> tuple[str, int]:
    """Registers that are computed once and from parameters alone become parameters; their number."""
    count: dict[str, int] = {}
    for statement in ptx.split(";"):
        for register in re.findall(r"%(?:rs|rd|r|p)\d+", statement.partition(", ")[0]):
            count[register] = count.get(register, 0) + 1
    known = {register for register in re.findall(r"ld\.param\.\S+\s+(%\w+),", ptx) if count[register] == 1}
    places: dict[str, int] = {}
    while True:
        before = len(places)
        for operation, register, operands in _SET.findall(ptx):
            used = re.findall(r"%[\w.]+", operands)
            is_new = count[register] == 1 and register not in places and len(places) < _UNIFORM_VALUES
            if is_new and used and operation.partition(".")[0] in _UNIFORM_OPERATIONS and known.issuperset(used):
                places[register] = abi.MAX_BUFFERS * _UNIFORM_BYTES + 8 * len(places)
                known.add(register)
        if len(places) == before:
            break

    def parameter(found: re.Match[str]) -> str:
        register = found[2]
        if register not in places:
            return found[0]
        bits = {"%rs": 16, "%rd": 64}.get(register[:3], 32)
        return f"\tld.param.b{bits} {register}, [uniform+{places[register]}];"

    return _SET.sub(parameter, ptx), len(places)


def live_registers(ptx: str) -> int:
    """The fewest registers, a multiple of 4, with which ptxas spills nothing; see the module. 256: at least so many."""

    def search(directory: Path) -> None:
        low, high = 16, 256
        while low < high:
            middle = (low + high) // 8 * 4
            used = nvidia.assemble(ptx, ENTRY, _THREADS, middle)
            if used.spill_stores or used.spill_loads:
                low = middle + 4
            else:
                high = middle
        # Given more registers ptxas may order instructions so that it needs even more: a lower limit may do as well.
        for limit in range(max(16, high - 48), high, 4):
            used = nvidia.assemble(ptx, ENTRY, _THREADS, limit)
            if not used.spill_stores and not used.spill_loads:
                high = limit
                break
        (directory / "registers").write_text(str(high))

    (path,) = disk.fetch(disk.key("live registers", toolchain.digest(), ptx), ("registers",), search)
    return int(path.read_text())
