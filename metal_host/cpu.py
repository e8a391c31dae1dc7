"""The CPU back end: compile a translated source to a shared library, load it, run launches with the fiber runtime."""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import mmap
import platform
import re
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import abi, calls, sites, toolchain, versions
from . import cache as disk
from .bindings import Bindings
from .frontend import Unit

FAST_STACK = 128 << 10
ARGUMENT = 1 << 20  # numbers of threadgroup memory from here on are [[threadgroup(n)]] arguments
_RUNTIME_FLAGS = ["-std=gnu11", "-O2", "-fPIC", "-ffreestanding", "-fno-stack-protector", "-fno-optimize-sibling-calls"]
# Metal lets a vector be read where its elements are aligned; x86 would trap on a stricter assumption.
_FAST = ["-O2", "-fno-optimize-sibling-calls", "-fmax-type-align=1"]
# One callback for each access as the source has it: no vectors of the optimiser's, no access left out, no loop unrolled.
_INSTRUMENTED = [
    *(
        "-O1",
        "-gline-tables-only",
        "-fno-optimize-sibling-calls",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-D__MH_INSTRUMENTED",
    ),
    *(
        "-fsanitize=thread",
        "-mllvm",
        "-tsan-instrument-func-entry-exit=0",
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
    ),
    *("-fsanitize=array-bounds", "-fsanitize-recover=array-bounds", "-fmax-type-align=8"),
]
# What a source asks for by pragma is code of ten times the size here: a callback at each access of each copy.
_UNROLLING = re.compile(r"(?<=#pragma clang loop unroll\()\w+(?=\))")


def link(objects: list[Path], output: Path) -> None:
    """A shared library that finds the runtime's and the C library's symbols when it is loaded."""
    names = [str(o) for o in objects]
    if sys.platform == "darwin":  # zig's linker signs, as macOS on arm64 demands
        target = f"{platform.machine().replace('arm64', 'aarch64')}-macos"
        shared = ["-target", target, "-shared", "-Wl,-undefined,dynamic_lookup"]
        toolchain.run(["cc", *shared, "-o", str(output), *names])
    else:
        toolchain.run(["ld.lld", "-shared", "--hash-style=gnu", "-Bsymbolic", "-o", str(output), *names])


def _compile_c(name: str, output: Path) -> None:
    headers = Path(toolchain.zig()).parent / "lib" / "include"
    flags = [*_RUNTIME_FLAGS, *toolchain.target(), "-isystem", str(headers)]
    toolchain.run(["clang", *flags, "-c", "-o", str(output), str(toolchain.RUNTIME / name)])


def _compile_with_libc(name: str, output: Path) -> None:
    machine = "aarch64" if platform.machine().lower() in ("arm64", "aarch64") else "x86_64"
    system = "macos" if sys.platform == "darwin" else "linux-gnu"
    flags = ["-target", f"{machine}-{system}", "-O2", "-fPIC", "-fno-sanitize=all", "-fno-stack-protector"]
    toolchain.run(["cc", *flags, "-c", "-o", str(output), str(toolchain.RUNTIME / name)])


def _runtime_files() -> list[Path]:
    """The fiber runtime as a shared library, and the object that is linked into every kernel's."""

    def build(directory: Path) -> None:
        objects = []
        for source in ("scheduler.c", "collective.c", "tensor.c", "faults.c", "shadow.c"):
            objects.append(directory / f"{source}.o")
            _compile_c(source, objects[-1])
        objects.append(directory / "crash.c.o")
        _compile_with_libc("crash.c", objects[-1])
        link(objects, directory / "runtime.so")
        _compile_c("table.c", directory / "table.o")

    return disk.fetch(disk.key("runtime", toolchain.digest(), *toolchain.target()), ("runtime.so", "table.o"), build)


@cache
def runtime() -> ctypes.CDLL:
    """The fiber runtime, loaded once, its symbols visible to kernels."""
    if libm := ctypes.util.find_library("m"):
        ctypes.CDLL(libm, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_runtime_files()[0]), mode=ctypes.RTLD_GLOBAL)
    library.__mh_guarded_launch.argtypes = [ctypes.POINTER(abi.Launch)]
    return library


@cache
def stacks() -> mmap.mmap:
    """Stacks for the most threads that a threadgroup may have; the system gives memory only to those used."""
    return mmap.mmap(-1, abi.MAX_THREADS * FAST_STACK)


def stacks_address() -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(stacks()))


class Shape(NamedTuple):
    """A launch's size in threads, three dimensions each."""

    grid: tuple[int, ...]
    group: tuple[int, ...]


@dataclass
class Compiled:
    """One kernel of a loaded library."""

    name: str
    unit: Unit
    library: ctypes.CDLL
    entry: int
    max_threads: int
    variables: list[abi.ThreadgroupRecord]
    constants: tuple[int, int]  # addresses of the source's tables
    unset: list[str]  # function constants that it reads and that have no value; known in the fast build
    sites: sites.Sites | None

    @property
    def threadgroup_bytes(self) -> int:
        """Static threadgroup memory as Metal lays it out: 16-byte steps."""
        return sum(-(-v.size // 16) * 16 for v in self.variables)


def compile_unit(unit: Unit, host_names: list[str], instrumented: bool) -> dict[str, Compiled]:
    """The kernels `host_names`, compiled into one library and loaded."""
    if not host_names:
        return {}
    entries = {name: f"__mh_entry_{i}" for i, name in enumerate(host_names)}
    source = unit.render(entries)
    if instrumented:
        source = _UNROLLING.sub("disable", source)
    mode = _INSTRUMENTED if instrumented else _FAST
    flags = [*toolchain.LANGUAGE, *versions.flags(unit.version), *toolchain.target(), *mode, "-fPIC"]
    runtime()
    table = _runtime_files()[1]

    def build(directory: Path) -> None:
        if instrumented:
            assembly = unit.compile([*flags, "-S"], source)
            assembly, found = sites.mark(assembly)
            (directory / "sites.json").write_text(json.dumps(found))
            (directory / "kernel.s").write_text(assembly)
            toolchain.run(
                ["clang", *toolchain.target(), "-c", "-o", str(directory / "kernel.o"), str(directory / "kernel.s")]
            )
            (directory / "kernel.s").unlink()
        else:
            code = unit.compile([*flags, "-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"], source)
            graph = calls.graph(code)
            calls.check_recursion(graph)
            reads = {name: calls.unset_constants(graph, symbol) for name, symbol in entries.items()}
            (directory / "unset.json").write_text(json.dumps({name: found for name, found in reads.items() if found}))
            options = [*toolchain.target(), *_FAST, "-fPIC", "-Wno-override-module"]
            toolchain.clang(["-x", "ir", *options, "-c", "-o", str(directory / "kernel.o"), "-"], input=code)
        link([directory / "kernel.o", table], directory / "kernel.so")
        (directory / "kernel.o").unlink()

    key = disk.key("cpu", toolchain.digest(), toolchain.version(), *flags, source)
    (path,) = disk.fetch(key, ("kernel.so",), build)
    return _load(unit, path, entries, instrumented)


def _extent(library: ctypes.CDLL, function: str) -> tuple[int, int]:
    """What runtime/table.c says: the first address and the one behind the last."""
    first, last = ctypes.c_void_p(), ctypes.c_void_p()
    library.__getattr__(function)(ctypes.byref(first), ctypes.byref(last))
    return first.value or 0, last.value or 0


def _load(unit: Unit, path: Path, entries: dict[str, str], instrumented: bool) -> dict[str, Compiled]:
    library = ctypes.CDLL(str(path))
    first, last = _extent(library, "__mh_records")
    count = (last - first) // ctypes.sizeof(abi.ThreadgroupRecord)
    records = (abi.ThreadgroupRecord * count).from_address(first) if count else []
    unset = {} if instrumented else json.loads((path.parent / "unset.json").read_text())
    table = sites.Sites(library, json.loads((path.parent / "sites.json").read_text())) if instrumented else None
    compiled = {}
    for host_name, symbol in entries.items():
        kernel = unit.kernels.instances[host_name].kernel
        compiled[host_name] = Compiled(
            name=host_name,
            unit=unit,
            library=library,
            entry=ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0,
            max_threads=ctypes.c_uint32.in_dll(library, f"{symbol}_max_threads").value,
            variables=[r for r in records if unit.variables[r.number].kernel == kernel.name],
            constants=_extent(library, "__mh_constants"),
            unset=unset.get(host_name, []),
            sites=table,
        )
    return compiled


def launch(compiled: Compiled, bindings: Bindings, shape: Shape, seed: int, layout: int) -> abi.Counters:
    """Run a kernel of the fast build."""
    request = prepare(compiled, bindings.addresses(), shape, seed, layout)
    threadgroup_arguments(request, compiled, bindings, margin=0)
    run(request)
    if request.report_count:
        address = request.reports[0].address
        raise RuntimeError(
            f"kernel {compiled.name}: an access at {address:#x}, where there is no memory; run it inside observe() to "
            "be told the line"
        )
    return request.counters


def threadgroup_arguments(
    request: abi.Launch, compiled: Compiled, bindings: Bindings, margin: int
) -> list[abi.ThreadgroupRecord]:
    """Memory for the kernel's [[threadgroup(n)]] arguments, between margins of so many bytes; one threadgroup runs at a
    time. Returns their records, numbered behind the source's variables: ARGUMENT + n."""
    records = []
    for index, size in bindings.threadgroup_bytes.items():
        memory = (ctypes.c_char * (size + 2 * margin + 128))()
        address = -(-(ctypes.addressof(memory) + margin) // 128) * 128
        bindings.kept.append(memory)
        request.threadgroup_arguments[index] = address
        records.append(abi.ThreadgroupRecord(address, size, ARGUMENT + index, 0))
    variables = [*compiled.variables, *records]
    request.variables = (abi.ThreadgroupRecord * len(variables))(*variables)
    request.variable_count = len(variables)
    return records


_running = threading.Lock()


def run(request: abi.Launch) -> None:
    """One launch at a time: the runtime has one set of fibers, and ctypes lets other Python threads go on."""
    with _running:
        runtime().__getattr__("__mh_guarded_launch")(ctypes.byref(request))


def prepare(compiled: Compiled, addresses: dict[int, int], shape: Shape, seed: int, layout: int) -> abi.Launch:
    request = abi.Launch(entry=compiled.entry, seed=seed, stacks=stacks_address(), stack_size=FAST_STACK, layout=layout)
    for index, address in addresses.items():
        request.arguments[index] = address
    request.grid[:], request.group[:] = shape
    return request
