"""From which length on this package's attention is faster than torch's: what `mtlflashattn tune` times."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import dispatch, timing
from . import serve, torch_paths
from .attention import as_called, problem
from .call import Arguments, call_of
from .measured import NEVER, CallClass, class_of

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_BATCH, _HEADS = 1, 8
_ROUNDS = 5
_BATCH_SECONDS = 0.02
_GAIN = 0.95  # of torch's time: less than that is noise, or not worth the change


class Kind(NamedTuple):
    """Calls to be timed."""

    dtype: str  # torch's name, without "torch."
    head_dim: int
    causal: bool
    gradient: bool  # time the forward and the backward pass together?

    def __str__(self) -> str:
        mask, direction = "causal" if self.causal else "full", "backward" if self.gradient else "forward"
        return f"{self.dtype} {self.head_dim} {mask} {direction}"


class Outcome(NamedTuple):
    call_class: CallClass
    shortest: float  # tokens; NEVER if ours is not faster even at the longest that was timed
    seconds: dict[int, tuple[float, float]]  # length -> ours and torch's, as far as they were timed


def kinds(dtypes: Sequence[str], head_dims: Sequence[int], causal: Sequence[bool]) -> list[Kind]:
    """All combinations, forward and backward."""
    return [Kind(t, d, c, g) for t in dtypes for d in head_dims for c in causal for g in (False, True)]


def measure(
    kind: Kind,
    device: torch.device | str,
    watch: timing.Stopwatch,
    *,
    lengths: Sequence[int] = LENGTHS,
    tick: Callable[[], object] = lambda: None,
) -> Outcome:
    """The least of `lengths` such that ours is faster there and at all longer ones. `tick` is called for each."""
    call = call_of(_draw(kind, device, max(lengths)))
    call_class = class_of(call, torch_paths.route(call, torch_paths.version(torch.__version__)))
    shortest, lost, seconds = NEVER, False, {}
    for length in sorted(lengths, reverse=True):
        if not lost:
            seconds[length] = ours, theirs = _medians(_draw(kind, device, length), kind.gradient, watch)
            lost = ours == math.inf or ours > _GAIN * theirs
            shortest = shortest if lost else float(length)
        tick()
    return Outcome(call_class, shortest, seconds)


def _draw(kind: Kind, device: torch.device | str, length: int) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, _HEADS, length, kind.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, kind.dtype)).requires_grad_(kind.gradient)
        for _ in range(3)
    )
    return Arguments(q, k, v, is_causal=kind.causal)


def _medians(arguments: Arguments, gradient: bool, watch: timing.Stopwatch) -> tuple[float, float]:
    """Seconds of a call: ours, torch's; infinitely many where it fails (torch's may have no room for its scores)."""
    medians = {_ours: math.inf, _torchs: math.inf}
    calls = {run: functools.partial(_run, run, arguments, gradient) for run in medians}
    for run in medians:
        try:
            watch(calls[run], 1)
        except RuntimeError:
            del calls[run]
    times = timing.rounds(calls, watch, _ROUNDS, _BATCH_SECONDS)
    medians.update((run, statistics.median(seconds)) for run, seconds in times.items())
    return medians[_ours], medians[_torchs]


def _run(attention: Callable[[Arguments], torch.Tensor], arguments: Arguments, gradient: bool) -> None:
    with torch.set_grad_enabled(gradient):
        out = attention(arguments)
        if gradient:
            torch.autograd.grad(out, arguments[:3], torch.ones_like(out))


def _ours(arguments: Arguments) -> torch.Tensor:
    return as_called(dispatch.attention(problem(arguments)).out, arguments.query)


def _torchs(arguments: Arguments) -> torch.Tensor:
    return serve.torchs(*arguments[:3], is_causal=arguments.is_causal)
