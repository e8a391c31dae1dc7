"""Timing contenders on a workload."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ... import timing
from ...tiers import reference
from . import memory
from .contenders import Contender, Unsupported, by_tier
from .workloads import Workload, inputs

_BATCH_SECONDS = 0.02
_ROUNDS = (3, 15)
_SLOW_SECONDS = 4.0  # a slower contender runs once


class Measurement(NamedTuple):
    """One contender on one workload. `why_not`: there are no times, and that is why.

    `seconds`: of each round. `error`: largest difference from the torch tier, of what rounding may make it, of the
    output and of gradients. `memory`: peak bytes beyond the inputs.
    """

    workload: Workload
    contender: str
    ours: bool
    seconds: tuple[float, ...] = ()
    error: float = 0.0
    memory: int = 0
    why_not: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range of the middle half of the rounds, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def tflops(self) -> float:
        return self.workload.flops / self.median / 1e12

    @property
    def gbytes(self) -> float:
        """10^9 bytes a second, of those that must be moved at least."""
        return self.workload.bytes / self.median / 1e9

    @property
    def differs(self) -> bool:
        """Is its result wrong, or far less accurate than with float32 arithmetic inside?"""
        return not self.error <= 1


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    device: torch.device | str,
    budget: float,
    watch: timing.Stopwatch,
    tick: Callable[[str], object] = lambda name: None,
) -> list[Measurement]:
    """All contenders on one workload, in about `budget` seconds and at least three rounds.

    `tick` is called with the name of the next contender.
    """
    x = inputs(workload, device)
    exact = by_tier(reference.TIER, workload, x)
    assert exact is not None
    found: dict[str, Measurement] = {}
    calls, once = {}, {}
    for contender in contenders:
        tick(contender.name)
        plain = Measurement(workload, contender.name, contender.ours)
        try:
            call = contender.prepare(workload, x)
            error = _error(call(), exact, getattr(torch, workload.dtype))
            taken = memory.peak(call, device)
            once[contender.name] = watch(call, 1)
        except Unsupported as reason:
            found[contender.name] = plain._replace(why_not=str(reason))
            continue
        except Exception as failure:  # other people's code: what it raises goes into the report
            first = (str(failure).strip().splitlines() or [""])[0]
            found[contender.name] = plain._replace(why_not=f"{type(failure).__name__}: {first}")
            continue
        found[contender.name] = plain._replace(error=error, memory=taken, seconds=(once[contender.name],))
        if once[contender.name] < _SLOW_SECONDS:
            calls[contender.name] = call
    round_seconds = sum(max(once[name], _BATCH_SECONDS) for name in calls)
    count = max(_ROUNDS[0], min(_ROUNDS[1], int(budget / round_seconds))) if calls else 0
    for name, seconds in timing.rounds(calls, watch, count, _BATCH_SECONDS).items():
        found[name] = found[name]._replace(seconds=tuple(seconds))
    return list(found.values())


def _error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """Rounding is relative to the largest value; of the output, to 1 at least, as values are."""
    shares = []
    for least, one, other in zip((1.0, 0.0, 0.0, 0.0), found, exact, strict=False):
        difference = (one.float() - other.float()).abs().nan_to_num(nan=torch.inf).max().item()
        largest = max(least, other.abs().max().item())
        shares.append(difference / (16 * torch.finfo(dtype).eps * largest + 2e-5))
    return max(shares)
