"""A core of an Apple GPU, and how long it takes for a round of a kernel's main loop (core.c).

On M1 to M4 a matrix product runs on the ordinary ALUs: 17 cycles of a scheduler, where its 512 multiplications and
additions in 32 lanes make 16. So a kernel reaches at most 94 % of the peak; every other instruction takes from that.

Apple7, Apple8: throughputs of philipturner/metal-benchmarks and dougallj/applegpu; the latencies, a load's issue and
the cache lines a cycle were set by hand with rows of M1 Max in view. Apple9: nothing is published; set from
metal-flash-attention's rows of M4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from metal_host import cache as disk
from metal_host import toolchain

from .program import Operation, Program, bank_cycles, lines

SOURCE = Path(__file__).parent / "core.c"


@dataclass(frozen=True)
class Core:
    """One generation's core. Cycles, bytes a cycle, and sizes."""

    name: str
    product: float = 17.0
    product_latency: float = 34.0
    float_product: float = 1.0  # more, for operands of 32 bits
    load_issue: float = 1.0  # of the scheduler, for an access ...
    load_width: float = 100.0  # ... and bytes a cycle
    overlap: float = 0.1  # part of that in which the scheduler does other things
    unit_width: int = 64  # bytes a cycle of the load unit, the same in banks of threadgroup memory
    unit_lines: float = 2.0  # cache lines of 128 bytes a cycle
    threadgroup_latency: float = 40.0
    device_latency: float = 350.0
    l2_width: float = 32.0
    l1_hits: float = 0.3  # part of loads from device memory that the first-level cache serves
    exponential: float = 4.0
    barrier: float = 15.0
    register_bytes: int = 208 << 10
    threadgroup_bytes: int = 60 << 10
    most_simdgroups: int = 96

    def groups(self, simdgroups: int, registers: int, threadgroup_bytes: int) -> int:
        """Threadgroups that are resident together."""
        lane = 4 * min(MOST_REGISTERS, -(-registers // 4) * 4)
        by_registers = self.register_bytes // (32 * lane * simdgroups)
        by_memory = self.threadgroup_bytes // threadgroup_bytes if threadgroup_bytes else by_registers
        return max(1, min(by_registers, by_memory, self.most_simdgroups // simdgroups))


MOST_REGISTERS = 128
APPLE7 = Core("Apple7")
APPLE8 = Core("Apple8")
APPLE9 = Core(
    "Apple9",
    load_issue=0.6,
    load_width=128.0,
    overlap=0.5,
    unit_width=128,
    unit_lines=4.0,
    threadgroup_latency=30.0,
    device_latency=250.0,
    l2_width=64.0,
    l1_hits=0.7,
    barrier=10.0,
    register_bytes=384 << 10,
    threadgroup_bytes=64 << 10,
)


@dataclass(frozen=True)
class Steady:
    """A round of one threadgroup among others: cycles of the core, and the parts of the time that units are busy."""

    cycles: float
    schedulers: float
    load_unit: float
    l2: float


class _Operation(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("issue", "unit", "l2", "latency")),
        *((name, ctypes.c_int) for name in ("number", "first_wait", "waits")),
    ]


_KINDS = ("alu", "exp", "shuffle", "product", "load", "store", "barrier", "copy")


@cache
def _library() -> ctypes.CDLL:
    def build(directory: Path) -> None:
        toolchain.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(directory / "core.so"), str(SOURCE)])

    key = disk.key("apple_model", SOURCE.read_text(encoding="utf-8"), toolchain.version(), toolchain.target()[1])
    (path,) = disk.fetch(key, ("core.so",), build)
    library = ctypes.CDLL(str(path))
    library.steady.restype = ctypes.c_double
    return library


def _encoded(core: Core, o: Operation, is_float: bool, waits: list[int]) -> _Operation:
    result = _Operation(_KINDS.index(o.kind), float(o.amount), number=-1, first_wait=len(waits), waits=len(o.waits))
    waits += o.waits
    if o.kind == "alu":
        result.latency = 3.0 if o.amount else 0.0
    elif o.kind == "exp":
        result.unit, result.latency = core.exponential * o.amount, 5.0
    elif o.kind == "shuffle":
        result.issue, result.latency = 2.0 * o.amount, 4.0 * o.amount
    elif o.kind == "product":
        extra = core.float_product * is_float
        result.issue, result.latency, result.number = core.product + extra, core.product_latency + extra, o.number
    elif o.kind == "copy":
        result.issue, result.l2, result.latency = 4.0, o.bytes / core.l2_width, core.device_latency
    elif o.kind in ("load", "store"):
        in_device, lane_bytes = o.space == "device", o.bytes // 32
        if in_device:
            touched = lines(o.addresses, lane_bytes) / core.unit_lines
        else:
            touched = bank_cycles(o.addresses, lane_bytes, core.unit_width)
        result.issue = (core.load_issue + o.bytes / core.load_width) * (1 - core.overlap)
        result.unit = max(touched, o.bytes / core.unit_width)
        if o.kind == "load":
            result.number = o.number
            result.latency = core.device_latency if in_device else core.threadgroup_latency
            result.l2 = o.bytes * (1 - core.l1_hits) / core.l2_width if in_device else 0.0
    return result


def steady(
    core: Core,
    program: Program,
    simdgroups: int,
    groups: int,
    leader: Sequence[Operation] = (),
    rounds: int = 16,
    skew: float = 0.37,
) -> Steady:
    """A round of a threadgroup of `simdgroups`, `groups` being resident. leader: the first simdgroup's operations."""
    waits: list[int] = []
    encoded = [[_encoded(core, o, program.float_operands, waits) for o in ops] for ops in (program.operations, leader)]
    numbers = 1 + max(o.number for ops in encoded for o in ops)
    busy = (ctypes.c_double * 3)()
    cycles = _library().steady(
        *(x for ops in encoded for x in ((_Operation * len(ops))(*ops), len(ops))),
        (ctypes.c_int * max(1, len(waits)))(*waits),
        *(max(1, numbers), simdgroups, groups, rounds, ctypes.c_double(core.barrier), ctypes.c_double(skew), busy),
    )
    return Steady(cycles, *busy)
