"""The NVIDIA back end: PTX from the same front end, loaded and launched through the CUDA driver.

PTX is made on any machine that has libdevice, a file of the CUDA toolkit; running it takes a GPU, its driver and torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import abi, toolchain, versions
from . import cache as disk
from .bindings import Bindings
from .cpu import Shape
from .frontend import Unit

ARCHITECTURE = "sm_90"
_TARGET = ["-target", "nvptx64-unknown-nvcl", "-Xclang", "-target-cpu", "-Xclang", ARCHITECTURE, "-O3"]
_SHARED = re.compile(
    r"^(?:\.weak |\.visible |\.extern )*\.global (\.align \d+ \.b8 (\S*threadgroup_variable\S*7storage\S*)\[(\d+)\];)",
    re.MULTILINE,
)
_CONSTANT = re.compile(r"\bld\.const\b|(?<=[\s;])\.const\b")
_DYNAMIC = "__mh_dynamic_shared"
_ENTRY = re.compile(r"(\.entry (\w+)\(.*?\n\))", re.DOTALL)


def can_assemble() -> bool:
    """Is there a CUDA toolkit to make PTX and assemble it with? Neither needs a GPU."""
    try:
        return libdevice().is_file() and shutil.which("ptxas") is not None
    except RuntimeError:
        return False


@cache
def libdevice() -> Path:
    """NVIDIA's math library for the compiler: of a CUDA toolkit, or of the triton package."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(root) / "nvvm/libdevice/libdevice.10.bc" for root in roots if root]
    found += [Path(p) / "triton/backends/nvidia/lib/libdevice.10.bc" for p in sys.path]
    for path in found:
        if path.is_file():
            return path
    raise RuntimeError("compiling for an NVIDIA GPU needs libdevice.10.bc of a CUDA toolkit; set CUDA_HOME")


def fast_matrices() -> bool:
    """METAL_HOST_FAST_MATRICES=1: products of float matrices in tf32, for timing; else in float's precision."""
    return os.environ.get("METAL_HOST_FAST_MATRICES", "0") not in ("", "0")


def alu_matrices() -> bool:
    """METAL_HOST_ALU_MATRICES=1: matrix products on the ordinary ALUs, for timing, with meaningless results."""
    return os.environ.get("METAL_HOST_ALU_MATRICES", "0") not in ("", "0")


def compile_ptx(unit: Unit, host_names: list[str], more_flags: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
    """(PTX, host name -> entry) of the kernels `host_names`, with threadgroup variables in shared memory."""
    entries = {name: f"__mh_entry_{i}" for i, name in enumerate(host_names)}
    source = unit.render(entries)
    flags = [
        *toolchain.LANGUAGE,
        *versions.flags(unit.version),
        *_TARGET,
        *(["-D__MH_FAST_MATRICES"] if fast_matrices() else []),
        *(["-D__MH_ALU_MATRICES"] if alu_matrices() else []),
        *more_flags,
    ]

    def build(directory: Path) -> None:
        link = ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", str(libdevice()), "-Wno-linker-warnings"]
        ptx = unit.compile([*flags, *link, "-S"], source)
        (directory / "kernel.ptx").write_text(in_shared(ptx))

    (path,) = disk.fetch(
        disk.key("ptx", toolchain.digest(), toolchain.version(), *flags, source), ("kernel.ptx",), build
    )
    return path.read_text(), entries


def in_shared(ptx: str) -> str:
    """Put threadgroup variables into shared memory; declare the dynamic one, where [[threadgroup(n)]] arguments are."""
    if _DYNAMIC in ptx:
        target = ".address_size 64\n"
        ptx = ptx.replace(target, f"{target}.extern .shared .align 16 .b8 {_DYNAMIC}[];\n", 1)
    return _SHARED.sub(r".shared \1", ptx)


def constant_in_global(ptx: str) -> str:
    """Put Metal's constant memory, which is buffers, into global memory."""
    return _CONSTANT.sub(lambda m: m[0].replace("const", "global"), ptx)


def for_group(ptx: str, threads: int, most_registers: int | None = None) -> str:
    """The PTX with its entries declared for groups of `threads`, and for at most so many registers a thread."""
    limit = f"\n.maxnreg {most_registers}" if most_registers else ""
    return _ENTRY.sub(rf"\1\n.maxntid {threads}, 1, 1{limit}", ptx)


@dataclass(frozen=True)
class Resources:
    """What ptxas says about a kernel and all functions that it calls."""

    registers: int
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    stack: int  # bytes, of the deepest chain of calls
    shared: int  # bytes


def assemble(
    ptx: str, entry: str, threads: int, most_registers: int | None = None, cubin: Path | None = None
) -> Resources:
    """Assemble with ptxas for groups of `threads`, into `cubin` if it is given; what the kernel `entry` takes.

    most_registers: the limit of a thread's. RuntimeError where there is no ptxas or it refuses.
    """
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        raise RuntimeError("ptxas of a CUDA toolkit is not on the PATH")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(for_group(ptx, threads, most_registers))
        out = str(cubin or f"{directory}/kernel.cubin")
        arguments = [ptxas, f"-arch={ARCHITECTURE}", "-v", "-o", out, str(path)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr.strip()}")
    return said_of(done.stderr, entry)


def said_of(log: str, entry: str) -> Resources:
    """What the log of `ptxas -v` says of a kernel: its own lines, and those of the functions that it calls.

    A kernel that was not inlined into its entry spills under its own name, while the entry's line says 0.
    """
    about = log[log.index(f"Compiling entry function '{entry}'") :]
    about = about.split("Compiling entry function")[1]

    def numbers(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, about)]

    return Resources(
        registers=max(numbers(r"Used (\d+) registers")),
        spill_stores=sum(numbers(r"(\d+) bytes spill stores")),
        spill_loads=sum(numbers(r"(\d+) bytes spill loads")),
        stack=max(numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)"), default=0),
        shared=max(numbers(r"(\d+) bytes smem"), default=0),
    )


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("arguments", ctypes.c_uint64 * abi.MAX_BUFFERS),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("threadgroup_offsets", ctypes.c_uint32 * abi.MAX_BUFFERS),
    ]


@cache
def _driver() -> ctypes.CDLL:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the context current
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


class Module:
    """Compiled PTX; assembled by the driver once for each group size."""

    def __init__(self, unit: Unit, host_names: list[str]):
        ptx, self.entries = compile_ptx(unit, host_names)
        self.ptx = constant_in_global(ptx)
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}

    def launch(self, name: str, bindings: Bindings, shape: Shape) -> None:
        grid, group = shape
        threads = -(-group[0] * group[1] * group[2] // 32) * 32
        arguments = _Arguments(grid=(ctypes.c_uint32 * 3)(*grid), group=(ctypes.c_uint32 * 3)(*group))
        kept = []  # the stream's allocator keeps the memory for the launch
        for index, tensor in bindings.tensors.items():
            if tensor.device.type != "cuda":
                raise RuntimeError(f"argument {index} is on {tensor.device}, another is on a GPU")
            arguments.arguments[index] = tensor.data_ptr()
        for index, data in bindings.inline.items():
            kept.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).cuda())
            arguments.arguments[index] = kept[-1].data_ptr()
        shared = 0
        for index, size in bindings.threadgroup_bytes.items():
            arguments.threadgroup_offsets[index] = shared
            shared += size  # a multiple of 16
        blocks = [-(-n // g) for n, g in zip(grid, group, strict=True)]
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self._function(self.entries[name], threads)
        _call("cuLaunchKernel", function, *blocks, threads, 1, 1, shared, stream, pointers, None)

    def _function(self, entry: str, threads: int) -> ctypes.c_void_p:
        if (entry, threads) not in self._functions:
            _driver()
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _call("cuModuleLoadData", ctypes.byref(module), for_group(self.ptx, threads).encode())
            _call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
            self._functions[entry, threads] = function
        return self._functions[entry, threads]
