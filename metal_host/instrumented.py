"""Instrumented launches.

The arguments are copied between wide margins, every access is checked, and faults are told in the terms of the source.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from . import abi, cpu
from .bindings import Bindings
from .errors import Fault, KernelFault

_MARGIN = 1 << 16
_ALIGNMENT = 256
_KINDS = {
    1: "race",
    2: "out of bounds",
    3: "uninitialised",
    4: "divergent barrier",
    5: "divergent simdgroup operation",
    6: "inactive lane",
    7: "index",
    8: "misaligned",
    9: "out of bounds",
    10: "scope",
    11: "extents",
    12: "layout",
    13: "index",
}
_CRASH = 9
_OPERATIONS = {
    1: "shuffle",
    2: "simdgroup reduction",
    3: "vote",
    4: "simdgroup matrix product",
    5: "simdgroup_barrier",
    6: "threadgroup_barrier",
    7: "tensor operation",
}
_ACCESSES = ("simdgroup_load", "simdgroup_store", "load of a tensor", "store of a tensor")
_TENSOR_MESSAGES = {
    "scope": "tensor operation of {index} threads, where there are {size}",
    "extents": "what lies outside a tensor's extents is taken",
    "layout": "a cooperative tensor is taken for one of another layout",
    "index": "slot {index} of a cooperative tensor whose capacity is {size}",
}
_NONE = 0xFFFFFFFF


def launch(
    compiled: cpu.Compiled,
    bindings: Bindings,
    shape: cpu.Shape,
    *,
    seed: int,
    lockstep: bool,
    allow_partial_collectives: bool,
    layout: int,
) -> abi.Counters:
    """Run a kernel of the instrumented build. Tensors are as after the launch also when it raises KernelFault."""
    arena = Arena(bindings)
    regions = list(arena.regions)
    request = cpu.prepare(compiled, arena.addresses, shape, seed, layout)
    arguments = cpu.threadgroup_arguments(request, compiled, bindings, margin=_MARGIN)
    for variable in [*compiled.variables, *arguments]:
        start = variable.address
        regions.append(abi.Region(start, start + variable.size, abi.SPACES.index("threadgroup"), variable.number))
    regions.append(abi.Region(*compiled.constants, abi.SPACES.index("constant"), abi.MAX_BUFFERS))
    regions.sort(key=lambda r: r.start)
    request.regions = (abi.Region * len(regions))(*regions)
    request.region_count = len(regions)
    request.sites, request.site_lines, request.site_count = (
        compiled.sites.addresses,
        compiled.sites.lines,
        len(compiled.sites.lines),
    )
    request.allow_partial_collectives, request.lockstep = allow_partial_collectives, lockstep
    cell = cpu.runtime().__getattr__("__mh_shadow_bytes")()
    size = sum((r.end - r.start) * cell for r in regions if r.space != abi.SPACES.index("constant"))
    with mmap.mmap(-1, size + mmap.PAGESIZE) as shadow:
        view = ctypes.c_char.from_buffer(shadow)
        request.shadow_memory, request.shadow_size = ctypes.addressof(view), size + mmap.PAGESIZE
        cpu.run(request)
        del view
    arena.copy_back()
    teller = Teller(compiled, bindings, regions)
    faults = [f for r in request.reports[: request.report_count] if (f := teller.fault(r))]
    arena.close()
    if faults:
        raise KernelFault(compiled.name, faults)
    return request.counters


class Arena:
    """A copy of every storage that the launch may touch, each with a margin before and behind that belongs to nobody.

    Views of one storage share a copy, as on the device: what lies outside the view and inside the storage is in bounds.
    """

    def __init__(self, bindings: Bindings):
        self._storages: dict[
            int, tuple[torch.UntypedStorage, int]
        ] = {}  # host address -> (storage, offset in the arena)
        self.regions: list[abi.Region] = []
        self.addresses: dict[int, int] = {}
        tensors = [(i, t) for i, t in bindings.tensors.items()]
        tensors += [(i, t) for i, ts in bindings.tensor_lists.items() for t in ts]
        writable = {}  # a storage bound as device anywhere is device memory
        for index, tensor in tensors:
            key = tensor.untyped_storage().data_ptr()
            writable[key] = writable.get(key, False) or bindings.space(index) == "device"
        size = _MARGIN
        layout = []
        for index, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._storages:
                continue
            self._storages[storage.data_ptr()] = (storage, size)
            layout.append((index, size, storage.nbytes(), "device" if writable[storage.data_ptr()] else "constant"))
            size = self._behind(size + storage.nbytes())
        inline = {}
        for index, data in bindings.inline.items():
            inline[index] = size
            layout.append((index, size, ctypes.sizeof(data), "constant"))
            size = self._behind(size + ctypes.sizeof(data))
        self._memory = mmap.mmap(-1, size + _MARGIN)
        self._view = ctypes.c_char.from_buffer(self._memory)
        base = self._base = ctypes.addressof(self._view)
        for index, offset, length, space in layout:
            self.regions.append(abi.Region(base + offset, base + offset + length, abi.SPACES.index(space), index))
        for host, (storage, offset) in self._storages.items():
            ctypes.memmove(base + offset, host, storage.nbytes())
        for index, data in bindings.inline.items():
            ctypes.memmove(base + inline[index], data, ctypes.sizeof(data))
            self.addresses[index] = base + inline[index]
            if index in bindings.tensor_lists:
                pointers = (ctypes.c_uint64 * len(data)).from_address(base + inline[index])
                pointers[:] = [self._address(t) for t in bindings.tensor_lists[index]]
        self.addresses |= {i: self._address(t) for i, t in bindings.tensors.items()}

    @staticmethod
    def _behind(end: int) -> int:
        return -(-(end + _MARGIN) // _ALIGNMENT) * _ALIGNMENT

    def _address(self, tensor: torch.Tensor) -> int:
        host = tensor.untyped_storage().data_ptr()
        return self._base + self._storages[host][1] + tensor.data_ptr() - host

    def copy_back(self) -> None:
        for host, (storage, offset) in self._storages.items():
            ctypes.memmove(host, self._base + offset, storage.nbytes())

    def close(self) -> None:
        del self._view
        self._memory.close()


class Teller:
    """Says what a report of the runtime means."""

    def __init__(self, compiled: cpu.Compiled, bindings: Bindings, regions: list[abi.Region]):
        self._sites, self._unit, self._bindings, self._regions = compiled.sites, compiled.unit, bindings, regions

    def fault(self, r: abi.Report) -> Fault | None:
        kind = _KINDS[r.fault]
        if kind == "index" and r.source:
            where = abi.UbsanLocation.from_address(r.source)
            message = f"index {r.index} is outside the array, {self._at(r)}"
            return Fault(kind, (where.file or b"").decode(), where.line, 0, message)
        if r.fault == _CRASH:
            file, line = self._sites.line(r.site)
            message = f"access at {r.address:#x}, where there is no memory, {self._at(r)}"
            return Fault(kind, file, line, 0, message)
        file, line = self._sites.place(r.site)
        other_file, other_line = self._sites.place(r.other_site) if r.other_site else ("", 0)
        if kind == "divergent barrier" and (file, line) == (other_file, other_line) and not r.write:
            return None  # two copies of one barrier that the compiler made
        there = f"line {other_line}" if other_file == file else f"{other_file}:{other_line}"
        if kind == "race":
            message = self._race(r, there)
        elif kind == "out of bounds":
            message = f"{self._access(r)} {self._outside(r)}, {self._at(r)}"
        elif kind == "misaligned":
            message = f"{self._access(r)} at address {r.address:#x}, no multiple of {min(r.size, 8)}, {self._at(r)}"
        elif kind == "uninitialised":
            message = (
                f"{self._access(r)} {self._inside(r)}, which no thread of the threadgroup has written, {self._at(r)}"
            )
        elif kind == "divergent barrier":
            flags = " with other flags" * r.write
            state = f"waits at the barrier of {there}{flags}" if other_line else "has ended"
            reached = f"{_OPERATIONS[r.kind]} reached by {r.mask} of {r.size} threads as one"
            message = f"{reached}: thread {r.other_thread} {state}, {self._at(r)}"
        elif kind in _TENSOR_MESSAGES:
            message = f"{_TENSOR_MESSAGES[kind].format(index=r.index, size=r.size)}, {self._at(r)}"
        elif kind == "inactive lane":
            reads = f"lane {r.thread % 32} reads lane {r.other_thread}, which takes no part"
            message = f"{reads} (active: {r.mask:#010x}), {self._at(r)}"
        else:
            state = f"waits at {there}" if other_line else "has ended"
            active, exists = bin(r.mask).count("1"), bin(r.size).count("1")
            reached = f"{_OPERATIONS[r.kind]} reached by {active} of {exists} lanes of the simdgroup"
            message = f"{reached}: thread {r.other_thread} {state}, {self._at(r)}"
        return Fault(kind, file, line, other_line, message)

    def _race(self, r: abi.Report, there: str) -> str:
        now = f"{self._thread(r.thread)} {('reads', 'writes')[r.write]} {self._inside(r)}"
        before = f"after the {('read', 'write')[r.other_write]} by {self._thread(r.other_thread)} at {there}"
        if r.mask:
            between = "in another threadgroup; nothing orders threadgroups"
        else:
            between = "with no barrier for this memory between"
        return f"{now} {before}, {between}, {self._at(r, thread=False)}"

    @staticmethod
    def _thread(thread: int) -> str:
        if thread < abi.MAX_THREADS:
            return f"thread {thread}"
        return f"simdgroup {thread % 32} ({_ACCESSES[(thread - abi.MAX_THREADS) // 32]})"

    def _at(self, r: abi.Report, thread: bool = True) -> str:
        group = ", ".join(map(str, r.group))
        return f"{self._thread(r.thread)} of threadgroup ({group})" if thread else f"in threadgroup ({group})"

    @staticmethod
    def _access(r: abi.Report) -> str:
        return f"{('read', 'write')[r.write]} of {r.size} byte{'s' * (r.size != 1)}"

    def _name(self, region: abi.Region) -> str:
        if abi.SPACES[region.space] == "threadgroup":
            if region.id >= cpu.ARGUMENT:
                return f"threadgroup '{self._bindings.threadgroup_name(region.id - cpu.ARGUMENT)}'"
            return f"threadgroup '{self._unit.variables[region.id].name}'"
        if region.id == abi.MAX_BUFFERS:
            return "the source's constants"
        return f"{abi.SPACES[region.space]} '{self._bindings.name(region.id)}'"

    def _inside(self, r: abi.Report) -> str:
        region = self._regions[r.region]
        return f"byte {r.address - region.start} of {self._name(region)}"

    def _outside(self, r: abi.Report) -> str:
        if r.near_region == _NONE:
            return f"at {r.address:#x}, where nothing is bound"
        region = self._regions[r.near_region]
        length = region.end - region.start
        if r.address < region.start:
            return f"{region.start - r.address} bytes before {self._name(region)}"
        if r.address < region.end:
            return f"across the end of {self._name(region)} ({length} bytes)"
        return f"{r.address - region.end} bytes past the end of {self._name(region)} ({length} bytes)"
