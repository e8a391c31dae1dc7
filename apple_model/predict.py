"""From a core's steady state to the time of a launch: threadgroups of any length, which go where there is room."""

from __future__ import annotations

import heapq
from collections import deque
from functools import cache
from typing import NamedTuple

from .chips import Chip
from .core import Core, Steady, steady
from .kernels import Kernel, with_rescaling


class Call(NamedTuple):
    batch: int
    heads: int
    queries: int
    keys: int
    causal: bool = False

    def operations(self, head_dim: int, products: int = 2) -> float:
        """Multiplications and additions of so many products of matrices, of the pairs that are seen."""
        pairs = self.queries * self.keys
        if self.causal:
            pairs -= self.queries * (self.queries - 1) // 2 if self.queries <= self.keys else 0
        return 2.0 * products * self.batch * self.heads * pairs * head_dim


class Prediction(NamedTuple):
    milliseconds: float
    share: float  # of the ALU peak
    bound: str
    groups: int  # threadgroups resident on a core


@cache
def round_of(core: Core, kernel: Kernel, groups: int, rounds: int) -> Steady:
    """A round of one threadgroup of `groups`, in a loop of `rounds`."""
    return steady(core, with_rescaling(kernel, rounds), kernel.simdgroups, groups, kernel.leader)


def resident(core: Core, kernel: Kernel) -> int:
    return core.groups(kernel.simdgroups, kernel.registers, kernel.threadgroup_bytes)


def rounds_of_tiles(kernel: Kernel, call: Call) -> list[int]:
    """Rounds of each tile of queries of a head, the longest first."""
    rounds = []
    for first in range(0, call.queries, kernel.rows):
        last = min(first + kernel.rows, call.queries) - 1
        seen = min(call.keys, last + call.keys - call.queries + 1) if call.causal else call.keys
        rounds.append(-(-seen // kernel.keys))
    return sorted(rounds, reverse=True)


def predict(chip: Chip, kernel: Kernel, call: Call, floor: float = 0.0, longest_first: bool = True) -> Prediction:
    """floor: milliseconds of a call outside the kernel. longest_first: does the grid begin with the longest tiles?"""
    core, rounds = chip.core, rounds_of_tiles(kernel, call)
    most = resident(core, kernel)
    typical = max(1, round(sum(rounds) / len(rounds)))
    total = len(rounds) * call.batch * call.heads
    cycles = [0.0]  # of a round of a threadgroup, by how many are resident
    cycles += [round_of(core, kernel, n, typical).cycles for n in range(1, min(most, -(-total // chip.cores)) + 1)]
    # What a threadgroup does outside its loop, as rounds.
    outside = (kernel.program.outside * kernel.simdgroups / 4 + 2 * core.device_latency / most) / cycles[-1]
    tiles = [r + outside for r in (rounds if longest_first else rounds[::-1])] * (call.batch * call.heads)
    milliseconds = floor + _launch(tiles, chip.cores, cycles) / chip.ghz / 1e6
    share = call.operations(kernel.head_dim, kernel.products) / (milliseconds / 1e3) / chip.peak
    return Prediction(milliseconds, share, bound_of(round_of(core, kernel, len(cycles) - 1, typical)), most)


def _launch(tiles: list[float], cores: int, cycles: list[float]) -> float:
    """Cycles until the last of the threadgroups ends, which go in order to the cores with most room.

    A core with n of them has done one round of each after n * cycles[n].
    """
    waiting = deque(tiles)
    most = len(cycles) - 1
    running: list[list[float]] = [[] for _ in range(cores)]  # rounds that are left
    since = [0.0] * cores
    ends: list[tuple[float, int]] = []
    time, changed = 0.0, list(range(cores))
    while True:
        room = [(len(running[n]), n) for n in changed if len(running[n]) < most]
        heapq.heapify(room)
        while waiting and room:
            count, n = heapq.heappop(room)
            running[n].append(waiting.popleft())
            if count + 1 < most:
                heapq.heappush(room, (count + 1, n))
        for n in changed:
            if core := running[n]:
                heapq.heappush(ends, (time + min(core) * len(core) * cycles[len(core)], n))
        if not ends:
            return time
        time, first = heapq.heappop(ends)
        changed = [first]
        while ends and ends[0][0] <= time * (1 + 1e-6):
            changed.append(heapq.heappop(ends)[1])
        for n in changed:
            core = running[n]
            done = (time - since[n]) / (len(core) * cycles[len(core)])
            running[n] = [r - done for r in core if r - done > 1e-5 * r + 1e-9]
            since[n] = time


def bound_of(busy: Steady) -> str:
    """What is busy most of the time; "latency" where nothing is."""
    units = {"ALUs": busy.schedulers, "load unit": busy.load_unit, "L2": busy.l2}
    name = max(units, key=units.__getitem__)
    return f"{name} {100 * units[name]:.0f} %" if units[name] >= 0.85 else f"latency ({name} {100 * units[name]:.0f} %)"
