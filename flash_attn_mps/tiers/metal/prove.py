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
from typing import Any, TypeVar

import torch

from ...problem import AttentionProblem
from . import compiler, launch, refusals
from .refusals import Refusal
from .specialization import Specialization
from .trial import Expected, Trial

Found = TypeVar("Found")


@dataclass(frozen=True)
class Proof:
    """`Kernel.proof`. `trial`: the trial of a specialization; it launches no other kernel."""

    trial: Callable[[Specialization], Trial]

    def __call__(self, specialization: Specialization, compiled: Any) -> Refusal | None:
        """Why the kernel, compiled so, is not to be used; None if it is. Waits for the device."""
        return apart(lambda: _refusal(self.trial, specialization, compiled))


def _refusal(
    trial_of: Callable[[Specialization], Trial], specialization: Specialization, compiled: Any
) -> Refusal | None:
    try:
        trial = trial_of(specialization)
        device = torch.device(next(iter(compiler.device_types)))
        tensors = {name: None if t is None else moved(t, device) for name, t in trial.tensors.items()}
        p = _on(trial, device, tensors)
        kernel, variant = specialization.kernel, specialization.variant
        asked, values = launch.arguments(kernel, p, variant, tensors, trial.parameters)
        if asked != specialization:
            raise AssertionError(f"its trial is for {asked}")
        threads, group_size = kernel.grid(p, variant)
        compiled(*values, threads=threads, group_size=group_size)
        return found_wrong(tensors, trial.expected)
    except Exception as error:  # whatever happens here would happen in the caller's program
        return refusals.broke(error)


def found_wrong(tensors: Mapping[str, torch.Tensor | None], expected: Mapping[str, Expected]) -> Refusal | None:
    """The first of `tensors` that does not hold what is expected of it. Waits for the device."""
    written = {name: t.cpu() for name, t in tensors.items() if t is not None and name in expected}
    for name, wanted in expected.items():
        error, allowed = _worst(written[name] if wanted.of is None else wanted.of(written), wanted)
        if not error <= allowed:
            return refusals.wrong(name, error, allowed)
    return None


def _on(trial: Trial, device: torch.device, tensors: dict[str, torch.Tensor | None]) -> AttentionProblem:
    """The problem on `device`; a tensor that is among the kernel's own is the same one."""
    already = {id(t): tensors[name] for name, t in trial.tensors.items() if t is not None}
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(trial.problem):
        value = getattr(trial.problem, field.name)
        if isinstance(value, torch.Tensor):
            there = already.get(id(value))
            changes[field.name] = moved(value, device) if there is None else there
    return dataclasses.replace(trial.problem, **changes)


def moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`t` on `device` with the memory around it, in one copy and without a kernel of PyTorch's own."""
    memory = torch.empty(0, dtype=t.dtype, device="cpu").set_(t.untyped_storage())
    return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def _worst(got: torch.Tensor, expected: Expected) -> tuple[float, float]:
    """The error that is largest beside what is allowed there, and that."""
    x, exact = got.double(), expected.value.double()
    error = (x - exact).abs_().nan_to_num_(nan=math.inf)
    error.masked_fill_((x == exact) | (x.isnan() & exact.isnan()), 0.0)
    allowed = torch.as_tensor(expected.allowed, dtype=torch.float64, device="cpu").expand_as(error)
    at = (error / allowed).argmax()
    return error.flatten()[at].item(), allowed.reshape(-1)[at].item()


def apart(function: Callable[[], Found]) -> Found:
    """In a thread of its own: there is no mode of the caller's there (autocast, a default device, inference, fake
    tensors, a dispatch mode that counts or records, a graph that is being captured)."""
    result: list[Found] = []
    thread = threading.Thread(target=lambda: result.append(function()), name="mtlflashattn proof", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is ending
        return function()
    thread.join()
    return result[0]
