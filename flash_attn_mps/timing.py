"""Timing of calls that a device runs asynchronously."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Call = Callable[[], object]
# (call, how often to make it) -> seconds of one. An argument wherever something is timed: tests bring their own clock.
Stopwatch = Callable[[Call, int], float]
Name = TypeVar("Name", bound=Hashable)


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done what it was given."""
    device = torch.device(device)
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device | str) -> Stopwatch:
    """A stopwatch that waits for `device` before and after a batch of calls, and not between them."""

    def seconds(call: Call, times: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        return (time.perf_counter() - begin) / times

    return seconds


def rounds(
    calls: Mapping[Name, Call], watch: Stopwatch, count: int, batch_seconds: float, tick: Call = lambda: None
) -> dict[Name, list[float]]:
    """Seconds of each call, `count` of them, after a warm-up (the first call may compile).

    In every round each call runs once, repeated for `batch_seconds`; every other round goes backwards, so that a clock
    that rises or a chip that heats up favours none. `tick` is called after each measurement.
    """
    batch = {name: max(1, min(1000, round(batch_seconds / max(watch(call, 1), 1e-7)))) for name, call in calls.items()}
    times: dict[Name, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(count):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(watch(calls[name], batch[name]))
            tick()
    return times
