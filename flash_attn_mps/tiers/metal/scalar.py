"""The `scalar` tier: one thread per query (`kernels/scalar.metal`). Exact and slow, for debugging."""

from __future__ import annotations

from typing import NamedTuple

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import launch, trial
from .kernel import OPTIONAL_BUFFERS, SERVES, Grid, Kernel
from .prove import Proof
from .specialization import Specialization


class Variant(NamedTuple):
    threads: int  # of a group: one for each query


VARIANT = Variant(threads=32)


def _grid(p: AttentionProblem, variant: Variant) -> Grid:
    return launch.tiles_of_queries(p, variant.threads, variant.threads)


def _trial(s: Specialization) -> trial.Trial:
    return trial.forward(s, s.variant.threads + 19, s.variant.threads + 14)


FORWARD = Kernel(
    entry="attention_scalar",
    headers=("metal_stdlib",),
    sources=("codes", "scoring", "philox", "keys", "scalar"),
    buffers=launch.FORWARD_BUFFERS,
    optional=tuple(OPTIONAL_BUFFERS),
    grid=_grid,
    threads=lambda variant: variant.threads,
    proof=Proof(_trial),
)


def _run(p: AttentionProblem) -> Result | None:
    return launch.run(p, FORWARD, VARIANT)


TIER = Tier("scalar", SERVES | {"dropout", "quantised"}, launch.limits, _run, metal=True)
