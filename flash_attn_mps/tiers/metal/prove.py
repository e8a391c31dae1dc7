"""A kernel proves itself before it is believed: what it gives for a small problem is compared with what it should.

Run by `compiler.kernel` when a specialization is first used on a machine. No test suite can stand for a compiler,
a GPU or a macOS that its authors never saw.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from ...problem import AttentionProblem
from . import compiler, launch, refusals
from .refusals import Refusal


class Expected(NamedTuple):
    """What a tensor should hold, and by how much rounding may change that (broadcasts). On the CPU.

    `of`: what is held against `value` instead of the tensor, made of all tensors that are expected to be written.
    """

    value: torch.Tensor
    allowed: torch.Tensor | float
    of: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None


class Launch(NamedTuple):
    """A call of a compiled kernel: what it is a specialization of, and the tensors that it writes."""

    specialization: Any
    values: list[Any]
    threads: tuple[int, ...]
    group_size: tuple[int, ...]
    written: Mapping[str, torch.Tensor]


class AnyTrial(Protocol):
    """One launch of a kernel, and what it must come to."""

    @property
    def expected(self) -> Mapping[str, Expected]:
        """Of the tensors that it writes."""

    def on(self, specialization: Any, device: torch.device) -> Launch:
        """The launch, with its tensors on `device`."""


class Trial(NamedTuple):
    """That of a `Kernel`. All tensors are on the CPU.

    `tensors`: the kernel's own buffers, outputs included.
    """

    problem: AttentionProblem
    tensors: Mapping[str, torch.Tensor | None]
    expected: Mapping[str, Expected]
    parameters: Mapping[str, int] = MappingProxyType({})

    def on(self, specialization: Any, device: torch.device) -> Launch:
        tensors = {name: None if t is None else moved(t, device) for name, t in self.tensors.items()}
        already = {id(t): tensors[name] for name, t in self.tensors.items() if t is not None}
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self.problem):
            value = getattr(self.problem, field.name)
            if isinstance(value, torch.Tensor):
                same = already.get(id(value))
                changes[field.name] = moved(value, device) if same is None else same
        p = dataclasses.replace(self.problem, **changes)
        kernel, variant = specialization.kernel, specialization.variant
        asked, values = launch.arguments(kernel, p, variant, tensors, self.parameters)
        written = {name: t for name, t in tensors.items() if t is not None and name in self.expected}
        threads, group_size = kernel.grid(p, variant)
        return Launch(asked, values, threads, group_size, written)


@dataclass(frozen=True)
class Proof:
    """`Program.proof`. `trial`: the trial of a specialization; it launches no other kernel."""

    trial: Callable[[Any], AnyTrial]

    def __call__(self, specialization: Any, compiled: Any) -> Refusal | None:
        """Why the kernel, compiled so, is not to be used; None if it is. Waits for the device."""
        return _apart(lambda: _refusal(self.trial, specialization, compiled))


def moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`t` on `device` with the memory around it, in one copy and without a kernel of PyTorch's own."""
    memory = torch.empty(0, dtype=t.dtype, device="cpu").set_(t.untyped_storage())
    return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def _refusal(trial_of: Callable[[Any], AnyTrial], specialization: Any, compiled: Any) -> Refusal | None:
    try:
        trial = trial_of(specialization)
        made = trial.on(specialization, torch.device(next(iter(compiler.device_types))))
        if made.specialization != specialization:
            raise AssertionError(f"its trial is for {made.specialization}")
        needed, most = math.prod(made.group_size), getattr(compiled, "max_threads_per_threadgroup", None)
        if most is not None and most < needed:
            return refusals.too_many_threads(needed, most)
        compiled(*made.values, threads=made.threads, group_size=made.group_size)
        written = {name: t.cpu() for name, t in made.written.items()}
        for name, expected in trial.expected.items():
            error, allowed = _worst(written[name] if expected.of is None else expected.of(written), expected)
            if not error <= allowed:
                return refusals.wrong(name, error, allowed)
    except Exception as error:  # whatever happens here would happen in the caller's program
        return refusals.broke(error)
    return None


def _worst(got: torch.Tensor, expected: Expected) -> tuple[float, float]:
    """The error that is largest beside what is allowed there, and that."""
    x, exact = got.double(), expected.value.double()
    error = (x - exact).abs_().nan_to_num_(nan=math.inf)
    error.masked_fill_((x == exact) | (x.isnan() & exact.isnan()), 0.0)
    allowed = torch.as_tensor(expected.allowed, dtype=torch.float64, device="cpu").expand_as(error)
    at = (error / allowed).argmax()
    return error.flatten()[at].item(), allowed.reshape(-1)[at].item()


def _apart(function: Callable[[], Refusal | None]) -> Refusal | None:
    """In a thread of its own: there is no mode of the caller's there (autocast, a default device, inference, fake
    tensors, a dispatch mode that counts or records, a graph that is being captured)."""
    result: list[Refusal | None] = []
    thread = threading.Thread(target=lambda: result.append(function()), name="mtlflashattn proof", daemon=True)
    thread.start()
    thread.join()
    return result[0]
