"""The `tensorops` tier: tiled FlashAttention-2 on the matrix units that M5 and later have beside their ALUs.

The kernel is that of the `simdgroup` tier (`kernels/forward.metal`) on other fragments: cooperative tensors, which
Metal 4 multiplies (`kernels/cooperative.metal`, `kernels/tensorops.metal`).
"""

from __future__ import annotations

from typing import NamedTuple

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import launch, simdgroup, trial, tune, variants
from . import tensorops_gate as gate
from . import tensorops_probe as probe
from .kernel import OPTIONAL_BUFFERS, SERVES, Choice, Grid, TunedKernel
from .prove import Proof
from .specialization import Specialization

LAYOUTS = {probe.GENERIC: 0, probe.APPLE10: 1, probe.LEGACY: 2}  # as cooperative.metal has them


class Variant(NamedTuple):
    """The shape of the kernel: what is fastest depends on the GPU."""

    rows: int  # queries of a simdgroup: a multiple of 16
    simdgroups: int  # simdgroups of a threadgroup
    keys: int  # keys of a block: a multiple of 32
    resident_q: bool  # do queries stay in registers? Else they are read again for each block.
    layout: int = LAYOUTS[probe.GENERIC]  # of cooperative tensors on this machine: nobody's choice

    def __str__(self) -> str:
        """Like "16x4x32" or "32x4x32-reread", as `MTLFLASHATTN_TENSOROPS_VARIANT` takes it."""
        return f"{self.rows}x{self.simdgroups}x{self.keys}{'' if self.resident_q else '-reread'}"


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    return element_bytes == 2


def default(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    return Variant(16, 4, 32, True)


def fallbacks(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> list[Variant]:
    """Less in registers, then smaller groups."""
    usual = default(element_bytes, head_dim, head_dim_v)
    return [usual, usual._replace(resident_q=False), Variant(16, 2, 32, False), Variant(16, 1, 32, False)]


def run(p: AttentionProblem, variant: Variant) -> Result | None:
    """The forward pass. None where the kernel is not to be used on this machine."""
    return None if probe.layout() is None else launch.run(p, FORWARD, on_this_machine(variant))


def on_this_machine(variant: Variant) -> Variant:
    """With the layout that the probe found."""
    layout = probe.layout()
    assert layout is not None
    return variant._replace(layout=LAYOUTS[layout])


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
    fallbacks=fallbacks,
    run=run,
    proof=Proof(_trial),
)

WAYS = Choice(
    entry="attention_tiled",
    variants=(gate.NAME, simdgroup.TIER.name),
    fits=lambda _, element_bytes, *__: element_bytes == 2,
    default=lambda *_: simdgroup.TIER.name if gate.unsuited() else gate.NAME,
    variable="MTLFLASHATTN_FORWARD",
    run=lambda p, way: (serve if way == gate.NAME else simdgroup.serve)(p),
)
_NOT_FASTEST = f"{simdgroup.TIER.name} is faster for such calls, as tuned or as {WAYS.variable} asks for"


def limits(p: AttentionProblem) -> list[str]:
    """Why another kernel is to compute `p`, or why no kernel can."""
    reasons = launch.limits(p)
    if p.q.itemsize != 2:
        reasons.append(f"matrix units multiply 16 bits, and q is {str(p.q.dtype).removeprefix('torch.')}")
    return reasons or _closed(p)


def _closed(p: AttentionProblem) -> list[str]:
    """Why the tier does not compute calls like `p` on this machine."""
    reasons = gate.unmet()
    if not reasons and variants.chosen(p, WAYS) != gate.NAME and not gate.is_forced():
        reasons = gate.unsuited() or (_NOT_FASTEST,)
    return list(reasons) or (probe.why_closed() if probe.layout() is None else [])


def serve(p: AttentionProblem) -> Result | None:
    """The forward pass, by the variant that is chosen or one in its place. None where none is to be used."""
    variant = variants.chosen(p, FORWARD, tune.briefly)
    result = run(p, variant)
    if result is None:
        others = (run(p, other) for other in variants.instead(p, FORWARD, variant))
        result = next((found for found in others if found is not None), None)
    return result


TIER = Tier(gate.NAME, SERVES | {"dropout", "quantised"}, limits, serve, metal=True)
