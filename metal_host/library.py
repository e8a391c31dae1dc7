"""compile_shader and what it returns, as torch.mps has them (torch 2.13): the same call forms, limits and errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import abi, apple, cpu, instrumented, layouts, nvidia, source, versions
from .bindings import Bindings
from .constants import Value
from .frontend import Unit, translate
from .kernels import Buffer, Kernel


@dataclass(frozen=True)
class Mode:
    """How launches run: see `observe`."""

    instrumented: bool = False
    seed: int = 0
    lockstep: bool = False
    allow_partial_collectives: bool = False
    layout: str | int | None = None
    log: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch inside `observe`: the kernel's name and what it counted (names: abi.COUNTERS)."""

    kernel: str
    counters: dict[str, int]


_DEFAULT = Mode()
_mode: ContextVar[Mode] = ContextVar("mode", default=_DEFAULT)


@contextmanager
def observe(
    *,
    instrumented: bool = True,
    seed: int = 0,
    lockstep: bool = False,
    allow_partial_collectives: bool = False,
    layout: str | int | None = None,
) -> Iterator[list[Launch]]:
    """Run the launches of a block under observation; yields the list that they are recorded in.

    instrumented: check every access; a launch with faults raises KernelFault. Byte counts exist only here.
        Launches on an NVIDIA GPU are not observed: there compute-sanitizer is the tool (README.md).
    seed: 0 runs ready threads in order, every other number in an order of its own.
    lockstep: the lanes of a simdgroup go from memory access to memory access together, as they do on Apple's GPUs,
        and two of them do not race. For kernels that leave out simdgroup barriers; needs the instrumented build.
    allow_partial_collectives: reductions, votes and shuffles may be reached by some lanes of a simdgroup
        only, which Metal defines but our kernels never mean.
    layout: where the elements of cooperative tensors are: "apple10", "legacy", or a number, which draws a placement that the
        interface allows; by default what METAL_HOST_LAYOUT says, else "apple10". Kernels need not be compiled again.
    """
    if lockstep and (seed or not instrumented):
        raise ValueError("lockstep is an order of its own, of instrumented launches: no seed, instrumented=True")
    log: list[Launch] = []
    layouts.number(layout)  # refuses what is none
    token = _mode.set(Mode(instrumented, seed, lockstep, allow_partial_collectives, layout, log))
    try:
        yield log
    finally:
        _mode.reset(token)


def compile_shader(
    source_text: str,
    *,
    constants: Mapping[str | int, Value] | None = None,
    version: str = versions.DEFAULT,
    include: Sequence[str | Path] = (),
    kernels: Sequence[str] | None = None,
) -> ShaderLibrary:
    """Compile Metal Shading Language; stands in for torch.mps.compile_shader(source), which takes the source alone.

    constants: values of the source's function constants, by name or number. Of the others
        is_function_constant_defined() says so, and a kernel that reads one is refused when it is looked up.
    version: the language version, "3.0" to "4.1"; what it lacks is refused. torch passes 3.0 to 4.0, by macOS.
    include: directories of headers. Those of the installed torch may be included without.
    kernels: names of those that are wanted, where a source has hundreds; by default all of them.

    Raises SyntaxError with the compiler's log for what Metal refuses. Kernels that are templates are compiled when they
    are first looked up. Inside an instrumented `observe` only the instrumented build is made at first; the other one
    (which also finds recursion) when it is launched.
    """
    return ShaderLibrary(front_end(source_text, constants or {}, version, include), kernels)


def front_end(
    source_text: str, constants: Mapping[str | int, Value], version: str, include: Sequence[str | Path]
) -> Unit:
    """The source, translated; see compile_shader."""
    versions.check(version)
    directories = [Path(d) for d in include]
    expanded = source.expand(source_text, source.include_directories())
    return translate(source.preprocess(expanded, version, directories), version, constants)


class ShaderLibrary:
    """The kernels of a source, as attributes."""

    def __init__(self, unit: Unit, wanted: Sequence[str] | None = None):
        self._unit = unit
        self._plain = [name for name, i in unit.kernels.instances.items() if not i.template_arguments and not i.deduced]
        if wanted is not None:
            self._plain = [name for name in self._plain if name in wanted]
        self._builds: dict[tuple[str, bool], cpu.Compiled] = {}
        self._modules: dict[str, nvidia.Module] = {}
        self._compile(self._plain, _mode.get().instrumented)

    def _compile(self, names: list[str], instrument: bool) -> None:
        for name, compiled in cpu.compile_unit(self._unit, names, instrument).items():
            self._builds[name, instrument] = compiled

    def compiled(self, name: str, instrument: bool = False) -> cpu.Compiled:
        if (name, instrument) not in self._builds:
            self._compile(self._plain if name in self._plain else [name], instrument)
        return self._builds[name, instrument]

    def module(self, name: str) -> nvidia.Module:
        """The kernel `name` as PTX, with the library's other plain kernels if it is one."""
        if name not in self._modules:
            names = self._plain if name in self._plain else [name]
            self._modules |= dict.fromkeys(names, nvidia.Module(self._unit, names))
        return self._modules[name]

    def resources(self, name: str, threads: int) -> nvidia.Resources:
        """What ptxas says of the kernel for groups of `threads`, the functions that it calls included. Needs no GPU."""
        module = self.module(name)
        return nvidia.assemble(module.ptx, module.entries[name], threads)

    def apple_ptx(self, name: str) -> str:
        """The kernel `name` as PTX to be counted, not run: one entry, with all calls inlined and Apple's operands.

        A matrix product is a line with "matrix product" in it: see apple.py.
        """
        return apple.compile_ptx(self._unit, name)

    def live_registers(self, name: str) -> int:
        """The most 32-bit registers of a lane that are alive together, with Apple's operands, as a multiple of 4.

        Counted in the kernel's code (apple.py). Apple's GPUs have 128. Needs a CUDA toolkit's libdevice, no GPU.
        """
        return apple.live_registers(self.apple_ptx(name))

    def kernel(self, name: str) -> Kernel:
        """What the source says of the kernel `name`: its arguments, its bound of threads."""
        return self._unit.kernels.instances[name].kernel

    def __getattr__(self, name: str) -> KernelFunction:
        if name.startswith("__") or name not in self._unit.kernels.instances:
            raise (AttributeError if name.startswith("__") else RuntimeError)(
                f"Failed to create function state object for: {name}"
            )
        return KernelFunction(self, name)

    def __dir__(self) -> list[str]:
        return list(self._unit.kernels.instances)


class KernelFunction:
    """A kernel, ready to be called as torch's are: see __call__."""

    thread_execution_width = 32

    def __init__(self, library: ShaderLibrary, name: str):
        self._library = library
        self._name = name
        self._kernel = library.kernel(name)
        compiled = library.compiled(name, _mode.get().instrumented)
        self._threadgroup_bytes, self._max_threads = compiled.threadgroup_bytes, compiled.max_threads
        self._check_pipeline(compiled)

    def _check_pipeline(self, compiled: cpu.Compiled) -> None:
        """What Metal says no to when the pipeline is made."""
        problem, name = "", self._name
        absent = [
            p.condition
            for p in self._kernel.arguments
            if isinstance(p, Buffer) and p.condition in self._library._unit.constants.unset
        ]
        if self._threadgroup_bytes > abi.MAX_THREADGROUP_BYTES:
            problem = (
                f"uses {self._threadgroup_bytes} bytes of threadgroup memory, the maximum is "
                f"{abi.MAX_THREADGROUP_BYTES}"
            )
        elif self._max_threads > abi.MAX_THREADS:
            problem = f"asks for {self._max_threads} threads per threadgroup, the maximum is {abi.MAX_THREADS}"
        elif unset := sorted({*absent, *compiled.unset}):
            problem = f"needs function constants that have no value: {', '.join(unset)}"
        if problem:
            raise RuntimeError(f"Failed to create pipeline state object, error: kernel '{name}' {problem}")

    @property
    def max_threads_per_threadgroup(self) -> int:
        return min(self._max_threads, abi.MAX_THREADS)

    @property
    def static_thread_group_memory_length(self) -> int:
        return self._threadgroup_bytes

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
        error_buf_idx: int | None = None,
        threadgroup_bytes: Mapping[int, int] | None = None,
    ) -> None:
        """Launch, as torch's kernels do; two things more: None leaves a buffer unbound that a function constant may take
        away, and threadgroup_bytes gives the length of each [[threadgroup(n)]] argument by its n."""
        bindings = Bindings(self._kernel.arguments, self._library._unit.constants)
        for index, value in enumerate(args):
            if value is not None or not bindings.optional(index):
                bindings.bind(index, value, arg_casts)
        bindings.set_threadgroup_bytes(threadgroup_bytes or {}, self._threadgroup_bytes)
        errors = None
        if error_buf_idx is not None:
            errors = torch.zeros(ErrorBuffer.size, dtype=torch.uint8, device="cuda" if bindings.on_gpu else "cpu")
            bindings.bind(error_buf_idx, errors, None)
        bindings.finish()
        shape = self._shape(threads, group_size, args)
        mode = _mode.get()
        layout = layouts.number(mode.layout)
        if bindings.on_gpu:
            self._library.module(self._name).launch(self._name, bindings, shape)
            if errors is not None:
                ErrorBuffer.raise_if_any(errors.cpu())
            return
        if mode.instrumented:
            counters = instrumented.launch(
                self._library.compiled(self._name, True),
                bindings,
                shape,
                seed=mode.seed,
                lockstep=mode.lockstep,
                allow_partial_collectives=mode.allow_partial_collectives,
                layout=layout,
            )
        else:
            counters = cpu.launch(self._library.compiled(self._name), bindings, shape, mode.seed, layout)
        if mode.log is not None:
            mode.log.append(Launch(self._name, {n: getattr(counters, n) for n in abi.COUNTERS}))
        if errors is not None:
            ErrorBuffer.raise_if_any(errors)

    def _shape(self, threads: Any, group_size: Any, args: tuple[Any, ...]) -> cpu.Shape:
        """Grid and group in three dimensions, from what the caller gave; all of it in threads, not groups."""
        limit = self.max_threads_per_threadgroup
        grid, group = _shape_of("threads", threads), _shape_of("group_size", group_size)
        if grid is None:
            grid = next(((t.numel(),) for t in args if isinstance(t, torch.Tensor)), None)
        if grid is None or not 0 < len(grid) < 4:
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        if group is not None and len(group) != len(grid):
            raise RuntimeError(
                f"size and group_size must have same number of dimensions: threads {grid}, group_size {group}"
            )
        if group is None:
            group = (min(grid[0], limit) if len(grid) == 1 else limit,) + (1,) * (len(grid) - 1)
        grid, group = (*grid, 1, 1)[:3], (*group, 1, 1)[:3]
        if group[0] * group[1] * group[2] > limit:
            raise ValueError(f"Threadgroup size exceeds {limit} limit")
        if min(grid) < 1 or min(group) < 1 or max(grid) >= 1 << 32:
            raise ValueError(
                f"threads and group_size must be positive and below 2**32, got threads={grid}, group_size={group}"
            )
        return cpu.Shape(grid, group)


def _shape_of(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int):
        return (value,)
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        return tuple(value)
    raise TypeError(f"{name} must be an int or a sequence of at most three ints, got {value!r}")


class ErrorBuffer:
    """The buffer of c10/metal/error.h: a count, then messages: file[128], func[128], message[250], a line number."""

    _message = 128 + 128 + 252 + 4
    _capacity = 30
    size = 4 + _capacity * _message

    @classmethod
    def raise_if_any(cls, buffer: torch.Tensor) -> None:
        data = bytes(buffer.tolist())
        count = int.from_bytes(data[:4], "little")
        if not count:
            return
        lines = []
        for i in range(min(count, cls._capacity)):
            m = data[4 + i * cls._message :][: cls._message]
            file, _, text = (part.split(b"\0")[0].decode() for part in (m[:128], m[128:256], m[256:506]))
            lines.append(f"{file}:{int.from_bytes(m[508:512], 'little')}: {text}")
        raise RuntimeError("\n".join(lines))
