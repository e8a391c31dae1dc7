"""Predicted times against published ones (measured.tsv)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from .by_hand import metal_flash_attention
from .chips import CHIPS, Chip
from .kernels import Kernel, torchs
from .predict import Call, Prediction, predict

# Of a source that does not name its chip: by the speed that its longest calls reach, twenty cores of M4's kind. What
# can be judged is how times go with the shape.
UNSTATED = replace(CHIPS["M4 Pro"], name="unstated")
MEASURED = Path(__file__).parent / "measured.tsv"
NOISE = 1.03  # times that differ by less are not ranked


@dataclass(frozen=True)
class Row:
    """A published time; `floor` of it passes outside the kernel, as the smallest calls of its source show."""

    chip: Chip
    kernel: Kernel
    element: str
    call: Call
    milliseconds: float
    floor: float
    in_view: bool  # when the model's parameters were set
    group: str  # of rows that differ in the tile, or in the length, alone
    source: str
    prediction: Prediction

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.prediction.milliseconds / self.milliseconds


def rows(chips: dict[str, Chip] = CHIPS) -> list[Row]:
    found = []
    with MEASURED.open(encoding="utf-8") as file:
        for r in csv.DictReader(file, delimiter="\t"):
            chip = UNSTATED if r["chip"] == UNSTATED.name else chips[r["chip"]]
            floor, causal = float(r["floor"]), r["causal"] == "1"
            call = Call(int(r["batch"]), int(r["heads"]), int(r["queries"]), int(r["keys"]), causal)
            kernel = _kernel(r["kernel"], r["tile"], r["element"], int(r["head_dim"]), causal)
            prediction = predict(chip, kernel, call, floor, longest_first=False)
            found.append(
                Row(
                    chip,
                    kernel,
                    r["element"],
                    call,
                    float(r["milliseconds"]),
                    floor,
                    r["in_view"] == "1",
                    r["group"],
                    r["source"],
                    prediction,
                )
            )
    return found


def _kernel(name: str, tile: str, element: str, head_dim: int, causal: bool) -> Kernel:
    first, second, third = (int(n) for n in tile.split("x"))
    if name.startswith("MFA"):
        _, way, cached = name.split()
        return metal_flash_attention(
            (first, second, third), element, head_dim, way == "staged", "q1" in cached, "o1" in cached
        )
    return torchs((first, second, third), element, head_dim, causal, name)


def mean_and_rms(ratios: Iterable[float]) -> tuple[float, float]:
    """Geometric mean, and e to the root mean square of the logarithms."""
    logs = [math.log(r) for r in ratios]
    return math.exp(sum(logs) / len(logs)), math.exp(math.sqrt(sum(x * x for x in logs) / len(logs)))


def ranked(pairs: list[tuple[float, float]]) -> tuple[int, int]:
    """(rightly, wrongly) ordered pairs of (measured, predicted)."""
    right = wrong = 0
    for (m, p), (n, q) in combinations(pairs, 2):
        if abs(math.log(m / n)) >= math.log(NOISE):
            right, wrong = right + ((m < n) == (p < q)), wrong + ((m < n) != (p < q))
    return right, wrong
