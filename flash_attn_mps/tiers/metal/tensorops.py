"""The `tensorops` tier: tiled FlashAttention-2 on the matrix units that M5 and later have beside their ALUs.

The kernel is that of the `simdgroup` tier (`kernels/forward.metal`) on other fragments: cooperative tensors, which
Metal 4 multiplies (`kernels/cooperative.metal`, `kernels/tensorops.metal`).
"""

from __future__ import annotations

from typing import NamedTuple

from ...problem import AttentionProblem
from . import launch, trial
from .kernel import OPTIONAL_BUFFERS, Grid, TunedKernel
from .prove import Proof
from .specialization import Specialization

LAYOUTS = {"generic": 0, "apple10": 1, "legacy": 2}  # as cooperative.metal has them


class Variant(NamedTuple):
    """The shape of the kernel: what is fastest depends on the GPU."""

    rows: int  # queries of a simdgroup: a multiple of 16
    simdgroups: int  # simdgroups of a threadgroup
    keys: int  # keys of a block: a multiple of 32
    resident_q: bool  # do queries stay in registers? Else they are read again for each block.
    layout: int = LAYOUTS["generic"]  # of cooperative tensors on this machine: nobody's choice

    def __str__(self) -> str:
        """Like "16x4x32" or "32x4x32-reread", as `MTLFLASHATTN_TENSOROPS_VARIANT` takes it."""
        return f"{self.rows}x{self.simdgroups}x{self.keys}{'' if self.resident_q else '-reread'}"


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    return element_bytes == 2


def default(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    return Variant(16, 4, 32, True)


def _trial(s: Specialization) -> trial.Trial:
    """Work for all simdgroups of a group, and a tail. There are more queries than keys: the first may see none."""
    queries, keys = s.variant.rows * s.variant.simdgroups, s.variant.keys
    seqlen_q = max(queries + 19, 2 * keys + 18)
    return trial.forward(s, seqlen_q, seqlen_q - 5)


def _grid(p: AttentionProblem, variant: Variant) -> Grid:
    return launch.tiles_of_queries(p, variant.rows * variant.simdgroups, 32 * variant.simdgroups)


FORWARD = TunedKernel(
    entry="attention_tensorops",
    headers=("metal_stdlib", "metal_tensor", "MetalPerformancePrimitives/MetalPerformancePrimitives.h"),
    sources=(
        *launch.LANE_SOURCES,
        "cooperative",
        *launch.FORWARD_SOURCES,
        "tensorops",
        "attend",
        "forward",
    ),
    buffers=launch.FORWARD_BUFFERS,
    optional=tuple(OPTIONAL_BUFFERS),
    defines={"attention_forward": "attention_tensorops"},  # the name that the function has in forward.metal
    grid=_grid,
    variants=tuple(
        Variant(rows, simdgroups, keys, resident_q)
        for rows in (16, 32)
        for simdgroups in (1, 2, 4, 8)
        for keys in (32, 64)
        for resident_q in (True, False)
    ),
    fits=fits,
    default=default,
    variable="MTLFLASHATTN_TENSOROPS_VARIANT",
    proof=Proof(_trial),
)
